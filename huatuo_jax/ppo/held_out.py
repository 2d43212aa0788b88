"""Judgings of the policy on held-out prompts, by the judge and the reward model, resumable.

`STAGE/judged/` holds `ITERATION/answers.jsonl`, each record with the initial policy's answer
and that iteration's, and one `labels.jsonl` for all iterations with its report and spending. The
judge is asked when the iteration's checkpoint is on disk: a killed run resumes with the very
answers that were being judged, and asks about none that has a verdict.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.core import distributed
from huatuo_jax.core.files import read_rows, write_file, write_rows
from huatuo_jax.data.answers import text_of
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.generation.prompts import Task, make_record, make_request
from huatuo_jax.generation.requests import Answer
from huatuo_jax.judge.config import reach_judge
from huatuo_jax.judge.labelling import LabelConfig
from huatuo_jax.judge.offline import open_offline
from huatuo_jax.judge.openai import OpenAIJudgeConfig
from huatuo_jax.judge.questions import Verdict, differ, verdicts_of, win_rates
from huatuo_jax.ppo import judging
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.judging import Judged
from huatuo_jax.ppo.prompts import TokenPrompt, held_out_tasks
from huatuo_jax.ppo.rollout import Sampled
from huatuo_jax.ppo.targets import RowShapes
from huatuo_jax.ppo.trainer import PpoState, Trainer
from huatuo_jax.preferences.label import LabelRun, run_labels
from huatuo_jax.training.scoring import GivenAnswer, Normalization, Scorer
from huatuo_jax.training.update import Variables, join

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "judged"
ANSWERS_FILE = "answers.jsonl"
LABELS_FILE = "labels.jsonl"
OUTCOME_FILE = "outcome.json"

Record = dict[str, Any]
MakeRecord = Callable[[Task, Sequence[Answer]], Record]

_EQUAL = Verdict(0.5, 0.5)


def open_held_out(cfg: PpoConfig, tokenizer: "PreTrainedTokenizerBase") -> list[Task]:
    """Reads the prompts whose answers are judged, as the policy is given them.

    Raises:
        ValueError: judge or prompts are not named, or the file holds none that fit, or one that the
            offline judge cannot judge.
        OSError: the file cannot be read.
    """
    assert cfg.judging is not None
    for field in ("judge", "prompts"):
        if getattr(cfg.judging, field) is None:
            raise ValueError(
                f"config.ppo.judging.{field}=None must be named where PPO is run by itself"
            )
    path = cfg.judging.prompts
    assert path is not None
    tasks = held_out_tasks(
        cfg.data,
        tokenizer,
        path=path,
        num_prompts=cfg.judging.num_prompts,
        max_new_tokens=cfg.rollout.max_new_tokens,
        purpose="to judge",
    )
    assert cfg.judging.judge is not None
    if cfg.judging.judge.base_url is None:
        prompts = [task.prompt for task in tasks]
        judge = cfg.judging.judge
        offline = open_offline(judge.offline_for(prompts), judge.clinic_judge)
        for task in tasks:
            offline.estimate(task.prompt, ("", ""))
    return tasks


def identity_of(cfg: PpoConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """Returns what win rates depend on, beside the config: the prompts, and the kind of judge."""
    assert cfg.judging is not None and cfg.judging.judge is not None
    whole = hashlib.sha256()
    for task in tasks:
        judged = (task.prompt.id, task.token_ids, task.prompt.reference, task.prompt.diagnosis)
        whole.update(repr(judged).encode("utf-8", "surrogatepass"))
    by_server = cfg.judging.judge.base_url is not None
    return {"prompts": whole.hexdigest()[:32], "judged_by_server": by_server}


def reach_server(cfg: PpoConfig) -> OpenAIJudgeConfig | None:
    """Reaches the judge's server, in the first process; None in others and for offline judges.

    Raises:
        ValueError: as `reach_judge`.
    """
    assert cfg.judging is not None and cfg.judging.judge is not None
    judge = cfg.judging.judge
    return distributed.by_first(
        "judge", lambda: reach_judge(judge, field="config.ppo.judging.judge")
    )


def record_of(
    task: Task,
    answers: Sequence[Answer],
    *,
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
) -> Record:
    """Makes the record of answers of the rollouts' engine, which makes no texts."""
    with_texts = [
        dataclasses.replace(
            one,
            text=text_of(
                tokenizer, one.token_ids[:-1] if one.finish_reason == "stop" else one.token_ids
            ),
        )
        for one in answers
    ]
    return make_record(task, with_texts, template, tokenizer)


@dataclasses.dataclass(kw_only=True)
class HeldOutJudging:
    """The judgings of a run.

    Attributes:
        cfg: the run's settings, with those of its judgings.
        folder: `STAGE/judged`.
        tasks: the prompts.
        server: the judge behind a server, in the first process; None for an offline judge.
        make_record: from a prompt and its answers to a record with texts.
        normalization: of the reward model's scores; None for raw ones.
        transformer: the policy's.
        keep: is called with the policy's variables where they are the best so far.
        history: of the judgings by now, the initial policy's first.
        turned: whether the last one ended the run, before its last iteration.
    """

    cfg: PpoConfig
    folder: pathlib.Path
    tasks: Sequence[Task]
    server: OpenAIJudgeConfig | None
    make_record: MakeRecord
    normalization: Normalization | None
    transformer: Transformer
    keep: Callable[[Variables], None]
    history: list[Judged] = dataclasses.field(default_factory=list)
    turned: bool = False
    _scorer: Scorer | None = None

    def open(self, history: Sequence[Mapping[str, Any]], *, restored: int | None) -> None:
        """Resumes from a checkpoint's history, and removes answers that came after it.

        Verdicts stay in the labels file: they belong to texts, whichever run has them.

        Args:
            history: of the checkpoint, as `to_json` gave it; empty without one.
            restored: the checkpoint's iteration; None without one.
        """
        self.history, self.turned = judging.from_json(history), False
        distributed.by_first(
            "judged answers", lambda: self._cut(-1 if restored is None else restored)
        )

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the history, for a checkpoint."""
        return [dataclasses.asdict(one) for one in self.history]

    def result(self) -> dict[str, Any]:
        """Returns which policy was kept, and why the run ended."""
        return judging.outcome(self.history, turned=self.turned)

    def is_due(self, iteration: int, *, is_last: bool = False) -> bool:
        """Tells whether the policy after so many iterations has to be judged and was not yet.

        Args:
            iteration: how many.
            is_last: the run ends with it, for another reason than that it is the last one.
        """
        if self.history and self.history[-1].iteration >= iteration:
            return False
        if is_last and iteration > self.cfg.warmup_iterations:
            return True
        return judging.is_due(
            self._judging.every,
            iteration,
            warmup=self.cfg.warmup_iterations,
            last=self.cfg.num_iterations,
        )

    def judge(self, state: PpoState, trainer: Trainer) -> Judged:
        """Judges the policy; keeps it where it is the best so far.

        Raises:
            ValueError: the judge stopped, or gave no verdict; what had arrived is kept.
            OSError: a file cannot be read or written.
        """
        iteration = int(state.iteration)
        place = self.folder / str(iteration) / OUTCOME_FILE
        found = distributed.told_by_first("judged before", lambda: _read_outcome(place))
        if found is None:
            judged = self._initial(state, trainer) if not iteration else self._judge(state, trainer)
            text = json.dumps(dataclasses.asdict(judged), indent=2, allow_nan=False)
            distributed.by_first("judged", lambda: write_file(place, f"{text}\n"))
        else:
            judged = Judged(**found)
        self.history.append(judged)
        if judging.kept_of(self.history) is judged:
            self.keep(state.policy.variables)
        self.turned = iteration < self.cfg.num_iterations and judging.has_turned(
            self.history, patience=self._judging.patience
        )
        return judged

    @property
    def _judging(self) -> judging.JudgingConfig:
        assert self.cfg.judging is not None
        return self.cfg.judging

    @property
    def _temperature(self) -> float:
        return self._judging.temperature or self.cfg.rollout.temperature

    def _initial(self, state: PpoState, trainer: Trainer) -> Judged:
        records = self._initial_records(state, trainer)
        half = {"share": 0.5, "share_low": 0.5, "share_high": 0.5}  # By definition.
        measured = self._measured(state, trainer, records, kl_per_sequence=0.0)
        return Judged(iteration=0, **half, **measured, pairs=0, failed=0, cost=None)

    def _judge(self, state: PpoState, trainer: Trainer) -> Judged:
        iteration = int(state.iteration)
        path = self.folder / str(iteration) / ANSWERS_FILE

        def make() -> list[Record]:
            initial = self._initial_records(state, trainer)
            answers = self._answers(state.policy.variables, trainer, iteration)
            return [
                record | {"answers": [*record["answers"], *new["answers"]]}
                for record, new in zip(initial, answers, strict=True)
            ]

        records = self._kept_or_made(path, make)
        own = [record | {"answers": record["answers"][1:]} for record in records]
        given = _given(own)
        policy, reference = state.policy.variables, self._reference(state, trainer)
        ratios_N = self._log_probs(trainer, policy, given)
        ratios_N -= self._log_probs(trainer, reference, given)
        measured = self._measured(state, trainer, own, kl_per_sequence=float(ratios_N.mean()))
        asked = distributed.told_by_first("verdicts", lambda: self._ask(path, records))
        verdicts = {name: Verdict(*orders) for name, orders in asked["verdicts"].items()}
        by_prompt: dict[str, list[Verdict]] = {}
        for index, record in enumerate(records):
            if record["id"] in verdicts:
                task = self.tasks[index // self._judging.num_samples]
                by_prompt.setdefault(task.prompt.id, []).append(verdicts[record["id"]])
        share = win_rates(by_prompt, seed=self.cfg.seed)["share"]
        return Judged(
            iteration=iteration,
            share=share["value"],
            share_low=share["low"],
            share_high=share["high"],
            **measured,
            pairs=len(verdicts),
            failed=len(records) - len(verdicts),
            cost=asked["cost"],
        )

    def _ask(self, answers: pathlib.Path, records: Sequence[Record]) -> dict[str, Any]:
        """Asks for verdicts on new answers against the initial ones; returns them with the cost."""
        texts = {record["id"]: [one["text"] for one in record["answers"]] for record in records}
        verdicts = {name: _EQUAL for name, pair in texts.items() if not differ(*pair)}
        cost: float | None = 0.0
        if len(verdicts) < len(texts):
            assert self._judging.judge is not None
            output = self.folder / LABELS_FILE
            labels = run_labels(
                LabelRun(
                    answers=str(answers),
                    output=str(output),
                    openai=self.server,
                    offline=self._judging.judge.offline_for(task.prompt for task in self.tasks),
                    clinic_judge=self._judging.judge.clinic_judge,
                    label=LabelConfig(protocol="pairwise", concurrency=self._judging.concurrency),
                    spending=self._judging.spending,
                ),
                lambda line: None,  # The loop prints one line per judging.
            )
            assert labels is not None
            verdicts |= verdicts_of(labels.judgements, one=1, other=0)
            costs = [one.cost for one in labels.judgements]
            known = [one for one in costs if one is not None]
            cost = math.fsum(known) if len(known) == len(costs) else None
            if not verdicts:
                raise ValueError(
                    f"{answers}: the judge gave no pair a verdict in both orders (the verdicts "
                    f"stay in {output}); run again to ask for those that failed"
                )
        return {"verdicts": verdicts, "cost": cost}

    def _initial_records(self, state: PpoState, trainer: Trainer) -> list[Record]:
        path = self.folder / "0" / ANSWERS_FILE
        # The reference has the initial policy's weights, at every iteration.
        return self._kept_or_made(
            path, lambda: self._answers(self._reference(state, trainer), trainer, 0)
        )

    def _answers(self, variables: Variables, trainer: Trainer, iteration: int) -> list[Record]:
        """Samples an answer a record; randomness depends on seed, iteration and prompt alone."""
        number = self._judging.num_samples
        digest = hashlib.sha256(f"judging {self.cfg.seed} {iteration}".encode()).digest()
        sampling = dataclasses.replace(trainer.sampler.sampling, temperature=self._temperature)
        requests = [
            make_request(task, sampling, seed=int.from_bytes(digest[:4], "big"), num_samples=number)
            for task in self.tasks
        ]
        records = []
        groups = trainer.sampler.answers(variables, requests)
        for task, answers in zip(self.tasks, groups, strict=True):
            for index, answer in enumerate(answers):
                record = self.make_record(task, [answer])
                name = f"{task.prompt.id} ({index + 1} of {number})"
                records.append(record | ({"id": name} if number > 1 else {}))
        return records

    def _measured(
        self,
        state: PpoState,
        trainer: Trainer,
        records: Sequence[Record],
        *,
        kl_per_sequence: float,
    ) -> dict[str, float]:
        """Measures reward, KL and length of the records' answers, one each."""
        given = _given(records)
        answers = [_answer(record) for record in records]
        prompts = [
            TokenPrompt.of(self.tasks[index // self._judging.num_samples])
            for index in range(len(records))
        ]
        trainer.rewards.begin(f"held-out answers of iteration {int(state.iteration)}")
        rewards = trainer.rewards.of(prompts, answers, group=None)
        scores_N = np.asarray(rewards.scores_N, np.float64)
        if self.normalization is not None:
            scores_N = self.normalization.apply(scores_N)
        ended = [answer.finish_reason == "stop" for answer in answers]
        rule = self.cfg.score.outside_training
        rewards_N = rule.rewards(jnp.asarray(scores_N, jnp.float32), jnp.asarray(ended))
        measured = {
            "reward": float(np.mean(np.asarray(rewards_N, np.float64), where=rewards.has_reward_N)),
            "kl_per_sequence": kl_per_sequence,
            "length": float(np.mean([len(one.token_ids) - one.prompt_length for one in given])),
        }
        if not all(map(np.isfinite, measured.values())):
            raise ValueError(
                f"iteration {int(state.iteration)}: reward or KL of the held-out answers is no "
                "number: the policy or the reward model is broken"
            )
        return measured

    def _log_probs(
        self, trainer: Trainer, variables: Variables, given: Sequence[GivenAnswer]
    ) -> np.ndarray:
        """Computes the log-probability of each answer."""
        cfg = self.cfg
        if self._scorer is None:
            shapes = RowShapes.of(cfg, trainer.mesh)
            self._scorer = Scorer(
                self.transformer,
                {},
                mesh=trainer.mesh,
                rows_at_once=shapes.at_once(shapes.width),
                row_length=shapes.width,
            )
        found = self._scorer.of(variables).log_probs(
            given, temperature=self._temperature, chunk=cfg.compute.loss_chunk
        )
        return np.array([np.asarray(one, np.float64).sum() for one in found])

    def _reference(self, state: PpoState, trainer: Trainer) -> Variables:
        return join(trainer.reference_in(state), state.policy.frozen)

    def _kept_or_made(self, path: pathlib.Path, make: Callable[[], list[Record]]) -> list[Record]:
        """Reads the records of a file; where there is none yet, all processes make them."""
        if distributed.told_by_first("answers kept", path.exists):
            return read_rows(path, unfinished="read")
        records = make()
        distributed.by_first("answers", lambda: write_rows(path, records))
        return records

    def _cut(self, restored: int) -> None:
        for place in self.folder.glob("*/"):
            if place.name.isdecimal() and int(place.name) > restored:
                for name in (OUTCOME_FILE, ANSWERS_FILE):
                    (place / name).unlink(missing_ok=True)


def _given(records: Sequence[Record]) -> list[GivenAnswer]:
    """Returns the records' first answers as the tokens that were sampled."""
    return [
        GivenAnswer(
            np.asarray([*record["prompt_token_ids"], *record["answers"][0]["token_ids"]], np.int32),
            len(record["prompt_token_ids"]),
        )
        for record in records
    ]


def _answer(record: Record) -> Sampled:
    """Returns a record's first answer as it was sampled."""
    one = record["answers"][0]
    return Sampled(one["token_ids"], one["finish_reason"])


def _read_outcome(place: pathlib.Path) -> dict[str, Any] | None:
    found: dict[str, Any] | None = None
    if place.exists():
        found = json.loads(place.read_text(encoding="utf-8"))
    return found

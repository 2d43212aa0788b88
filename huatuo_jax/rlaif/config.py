"""The settings of the whole recipe: one section a stage."""

import dataclasses
import os
from typing import Literal

from huatuo_jax.clinic import files as clinic_files
from huatuo_jax.clinic.files import ClinicConfig
from huatuo_jax.clinic.planted import Difference
from huatuo_jax.data.records import Kind
from huatuo_jax.data.sources import source_names
from huatuo_jax.evaluation.config import EvaluationConfig
from huatuo_jax.feedback.budget import BudgetConfig
from huatuo_jax.feedback.comparison_config import ComparisonConfig
from huatuo_jax.feedback.label_command import OfflineName
from huatuo_jax.feedback.labelling import LabelConfig
from huatuo_jax.feedback.openai_judge import OpenAIJudgeConfig
from huatuo_jax.feedback.rate_limits import RateLimits
from huatuo_jax.feedback.replies import Structured
from huatuo_jax.feedback.server_calls import ServerConfig
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.reward.config import ProbeConfig, RewardConfig
from huatuo_jax.sft import CLINIC_FOLDER, SftConfig
from huatuo_jax.sharding import MeshConfig
from huatuo_jax.training.dialogue_data import SourceConfig
from huatuo_jax.training.run_directory import operational
from huatuo_jax.training.sections import WORKDIR_MARK, placed_in

STAGES = ("sft", "answers", "labels", "reward", "ppo", "evaluation", "export", "report")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """The prompts: of files, or made of the dialogues, each up to the doctor's longest answer.

    Attributes:
        files: of prompts to learn from, separated by commas; None makes them of the dialogues that
            fine-tuning trains on, or takes those of the run's clinic.
        held_out_files: of held-out prompts; None makes them of the dialogues that fine-tuning holds
            out, or takes those of the run's clinic. A prompt in files on both sides is refused.
        kinds: dialogues of these kinds are taken, and those that tell no kind.
        limit: so many prompts to learn from at most, chosen by their content; None for all.
        held_out_limit: so many held-out prompts at most.
    """

    files: str | None = operational(None)  # Their content decides.
    held_out_files: str | None = operational(None)
    kinds: tuple[Kind, ...] = ("real_instruction", "real_conversation")
    limit: int | None = None
    held_out_limit: int | None = 200

    def __post_init__(self) -> None:
        """Raise ValueError for a limit below 1."""
        for name in ("limit", "held_out_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r} must be at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """The answers that are judged.

    Attributes:
        model: who answers; the SFT stage's model unless told otherwise.
        prompts: file of prompts; those made of the dialogues unless told otherwise.
        max_left_out_share: share of the prompts that may be left out as too long for the model.
        num_samples: answers to each prompt.
        sampling: how they are drawn.
        seed: of the answers.
        chunk_size: prompts whose answers are written together.
        slots: answers decoded at once; None for up to 64.
        mesh: how the devices are divided; `tensor` leaves weights in their place while answers are
            decoded, `fsdp` gathers them for every token.
    """

    model: str = operational("{workdir}/sft/model")
    prompts: str = operational("{workdir}/prompts.jsonl")
    max_left_out_share: float = operational(0.1)
    num_samples: int = 4
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    chunk_size: int = operational(256)
    slots: int | None = operational(None)
    mesh: MeshConfig = operational(MeshConfig())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelsConfig:
    """The judge, what it is asked, and which comparisons its verdicts make.

    Attributes:
        answers: the answers file.
        base_url: an OpenAI-compatible server's address, with its `/v1`; None for an offline judge.
        offline: which one: the `rubric`, which is fixed and no substitute for a judge that reads,
            or the `clinic`, which knows the truth of that world's prompts, and no others; `auto`
            for the clinic where all prompts that are judged are of it, else the rubric.
        model: the judge's name on the server; None where the server has only one.
        max_cost: money that all runs may spend, in the currency of the price table.
        max_requests: calls that all runs may make.
        requests_per_minute: what the server allows.
        tokens_per_minute: what the server allows.
        timeout_s: of a call.
        structured: "json_schema" or "json_object" where the server can hold a reply to a form.
        max_tokens: of a reply, its thoughts among them.
        prices: file of the price table; None for the one that is shipped.
        label: what is asked.
        comparison: the policies by which verdicts become comparisons.
    """

    answers: str = operational("{workdir}/answers.jsonl")
    base_url: str | None = operational(None)
    offline: Literal["auto"] | OfflineName = "auto"
    model: str | None = None
    max_cost: float | None = operational(None)
    max_requests: int | None = operational(None)
    requests_per_minute: int | None = operational(None)
    tokens_per_minute: int | None = operational(None)
    timeout_s: float = operational(120.0)
    structured: Structured = "json_schema"
    max_tokens: int = operational(1024)
    prices: str | None = operational(None)
    label: LabelConfig = LabelConfig()
    comparison: ComparisonConfig = ComparisonConfig()

    def __post_init__(self) -> None:
        """Raise ValueError where the judge cannot be, or is told what the offline one ignores."""
        if self.base_url is None:
            for name in ("model", "max_cost", "max_requests"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is ignored by the offline judge; set base_url to use a model"
                    )
        else:
            self.openai(self.model or "the server's")
        if self.label.protocol == "both":
            raise ValueError("label.protocol='both' makes no comparisons; take score or pairwise")

    def openai(self, model: str) -> OpenAIJudgeConfig:
        """The judge behind the server, by its name there."""
        assert self.base_url is not None
        limits = RateLimits(requests=self.requests_per_minute, tokens=self.tokens_per_minute)
        budget = BudgetConfig(max_requests=self.max_requests, max_cost=self.max_cost)
        return OpenAIJudgeConfig(
            model=model,
            structured=self.structured,
            max_tokens=self.max_tokens,
            prices=self.prices,
            require_reference=False,
            server=ServerConfig(
                base_url=self.base_url, budget=budget, limits=limits, timeout_s=self.timeout_s
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What is released, in Hugging Face format.

    Attributes:
        policy: model folder, to `export/policy`.
        reward: reward model's folder, to `export/reward`.
        dtype: of the weights; None keeps the stored one.
    """

    policy: str = operational("{workdir}/ppo/model")
    reward: str = operational("{workdir}/reward/model")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report.

    Attributes:
        title: its heading.
        num_prompts: prompts whose answers are shown side by side.
    """

    title: str = "HuatuoGPT recipe"
    num_prompts: int = 8


def clinic_probes() -> tuple[ProbeConfig, ...]:
    """The clinic's pairs that differ in one thing alone, as it writes them into a run's folder."""
    kinds: tuple[tuple[Difference, str, bool], ...] = (
        ("truth", "true", False),
        ("manner", "friendlier", True),
        ("length", "longer", True),
    )
    return tuple(
        ProbeConfig(
            name=name,
            paths=(f"{WORKDIR_MARK}/{CLINIC_FOLDER}/{clinic_files.pairs_file(name)}",),
            chosen=chosen,
            neutral=neutral,
        )
        for name, chosen, neutral in kinds
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RlaifConfig:
    """The recipe. `{workdir}` in a path stands for the run's folder.

    Attributes:
        recipe: says that a config is of this kind.
        stages: which of them are run, in this order.
        data: files of dialogues of one's own, separated by commas; None for `sft.data.sources`.
        data_encoding: of those files, such as cp1252; None tells it by evidence.
        clinic: which clinic is written to `{workdir}/clinic` before anything is read there. Its
            prompts are the run's, unless `prompts` names files; its pairs that differ in one thing
            alone are probes of the reward model. None for none, and `data` leaves it out.
        prompts: to learn from, and held out.
        sft: supervised fine-tuning.
        answers: answers of its model, to be judged.
        labels: the judge's verdicts, and comparisons of them.
        reward: the reward model.
        ppo: the policy.
        evaluation: of base, SFT and PPO on held-out prompts.
        export: in Hugging Face format.
        report: `report.html`.
    """

    recipe: Literal["rlaif"] = "rlaif"
    stages: tuple[str, ...] = STAGES
    data: str | None = None
    data_encoding: str | None = None
    clinic: ClinicConfig | None = None
    prompts: PromptsConfig = PromptsConfig()
    sft: SftConfig
    answers: AnswersConfig = AnswersConfig()
    labels: LabelsConfig = LabelsConfig()
    reward: RewardConfig
    ppo: PpoConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()

    def __post_init__(self) -> None:
        """Raise ValueError for stages out of order, and for stages that speak different formats."""
        places = [STAGES.index(name) for name in self.stages if name in STAGES]
        if len(places) < len(self.stages) or places != sorted(set(places)):
            raise ValueError(f"stages={self.stages} must be some of {STAGES}, in this order")
        if self.sft.clinic not in (None, self.clinic):
            raise ValueError("sft.clinic must be None: in the recipe the clinic's field is clinic")
        template = self.sft.data.template
        for name, other in (
            ("reward.data.template", self.reward.data.template),
            ("ppo.data.template", self.ppo.data.template),
            ("evaluation.template", self.evaluation.template),
        ):
            if other != template:
                raise ValueError(
                    f"{name}={other!r} must be sft.data.template={template!r}: all stages have to "
                    "say a dialogue in the same way"
                )
        system, date = self.sft.data.default_system, self.sft.data.template_date
        for name, later, told in (
            ("reward.data.template_date", self.reward.data.template_date, date),
            ("ppo.data.template_date", self.ppo.data.template_date, date),
            ("reward.data.default_system", self.reward.data.default_system, system),
            ("ppo.data.default_system", self.ppo.data.default_system, system),
            ("evaluation.default_system", self.evaluation.default_system, system),
        ):
            if later not in (None, told):
                field = name.rpartition(".")[2]
                raise ValueError(
                    f"{name}={later!r} must be None or sft.data.{field}={told!r}, which the model "
                    "of the SFT stage is trained with"
                )

    @property
    def base_as_it_is(self) -> str | None:
        """The base model's directory, where it can be asked as it stands; None where it cannot.

        It can where it brings the tokenizer that the run uses and all that the run says to it.
        """
        model, data = self.sft.model, self.sft.data
        changed = model.tokenizer is not None or model.ignore_config_fields
        told = data.template_date is not None or data.default_system is not None
        return None if changed or (told and data.template == "tokenizer") else model.directory

    def in_workdir(self, workdir: str | os.PathLike[str]) -> "RlaifConfig":
        """The config with the run's folder in its paths, and one's own data or the clinic's.

        The evaluation has what it takes from other stages: the base model, PPO's temperature and
        rule of scores. All stages have fine-tuning's system text.
        """
        cfg = placed_in(self._with_data(), workdir)._with_system_text()
        base = cfg.evaluation.base or cfg.base_as_it_is or f"{workdir}/base/model"
        rule = cfg.evaluation.score or cfg.ppo.score.outside_training
        temperature = cfg.evaluation.temperature
        if temperature is None:
            temperature = cfg.ppo.rollout.temperature
        evaluation = dataclasses.replace(
            cfg.evaluation, base=base, score=rule, temperature=temperature
        )
        return dataclasses.replace(cfg, evaluation=evaluation)

    def with_offline_judge(self, name: OfflineName) -> "RlaifConfig":
        """The config with an offline judge in place of "auto", and wherever none is named."""
        named = name if self.labels.offline == "auto" else self.labels.offline
        return dataclasses.replace(
            self,
            labels=dataclasses.replace(self.labels, offline=named),
            evaluation=dataclasses.replace(self.evaluation, judge=self.evaluation.judge or named),
        )

    def _with_data(self) -> "RlaifConfig":
        """One's own files, which leave the clinic out, or what the clinic writes."""
        if self.data is not None:
            paths = self.data.split(",")
            sources = tuple(
                SourceConfig(name=name, paths=(path,), encoding=self.data_encoding)
                for name, path in zip(source_names(paths), paths, strict=True)
            )
            data = dataclasses.replace(self.sft.data, sources=sources)
            sft = dataclasses.replace(self.sft, data=data, clinic=None)
            return dataclasses.replace(self, clinic=None, sft=sft)
        if self.clinic is None:
            return self
        folder = f"{WORKDIR_MARK}/{CLINIC_FOLDER}"
        held_out = f"{folder}/{clinic_files.HELD_OUT}{clinic_files.PROMPTS}"
        prompts = dataclasses.replace(
            self.prompts,
            files=self.prompts.files or f"{folder}/{clinic_files.PROMPTS}",
            held_out_files=self.prompts.held_out_files or held_out,
        )
        probes = clinic_probes() if self.clinic.sizes.pairs else ()
        reward = dataclasses.replace(self.reward, probes=(*self.reward.probes, *probes))
        return dataclasses.replace(
            self,
            prompts=prompts,
            reward=reward,
            sft=dataclasses.replace(self.sft, clinic=self.clinic),
        )

    def _with_system_text(self) -> "RlaifConfig":
        system = self.sft.data.default_system
        data = {
            stage: dataclasses.replace(getattr(self, stage).data, default_system=system)
            for stage in ("reward", "ppo")
        }
        return dataclasses.replace(
            self,
            reward=dataclasses.replace(self.reward, data=data["reward"]),
            ppo=dataclasses.replace(self.ppo, data=data["ppo"]),
            evaluation=dataclasses.replace(self.evaluation, default_system=system),
        )

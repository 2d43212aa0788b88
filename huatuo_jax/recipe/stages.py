"""Makes the recipe's stages: inputs, outputs and call of each."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from huatuo_jax.checkpoint import models
from huatuo_jax.core import distributed
from huatuo_jax.core.config import identity, placed_in
from huatuo_jax.core.files import as_path, read_lines
from huatuo_jax.core.folders import is_written
from huatuo_jax.core.progress import tell
from huatuo_jax.data.readers import content_hash
from huatuo_jax.data.records import is_empty
from huatuo_jax.evaluation.answers import sampling_of
from huatuo_jax.evaluation.stage import run_evaluation, write_json
from huatuo_jax.evaluation.suite_run import PAGE_FILE, RESULTS_FILE, SuiteRun
from huatuo_jax.evaluation.suite_settings import given_files
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.judge.config import reach_judge
from huatuo_jax.ppo.config import PpoConfig
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.preferences.label import LabelRun, report_path, run_labels
from huatuo_jax.recipe.config import LABELS_FILE, SUITES_FLAG, RlaifConfig
from huatuo_jax.recipe.export import RELEASE_FILE, choose_policy, run_export
from huatuo_jax.recipe.synthesis import JUDGE, SYNTHESIS_FLAG
from huatuo_jax.report.evaluation_page import write_page
from huatuo_jax.report.main_figures import main_figures
from huatuo_jax.report.page import write_report
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.reward.stage import run_reward
from huatuo_jax.sft import run_sft, settled_config
from huatuo_jax.synthesis.run import Synthesis, is_saved_model
from huatuo_jax.training.dialogue_data import open_dialogues
from huatuo_jax.training.initial_model import open_model
from huatuo_jax.training.optimizer import OptimizerConfig, make_optimizer

REPORT_FILE = "report.html"


class Stage(NamedTuple):
    """One stage of a run.

    Attributes:
        name: as in the config.
        settings: the fields that decide its result.
        inputs: by name: files, folders, or names on the Hub.
        outputs: files and folders that exist when it is finished.
        run: runs or resumes it and returns its main figures. All processes must call it; figures of
            work that only the first process does are returned by that one.
        follows: it is run again where an input has changed; other stages, which take long or cost
            money, refuse to.
    """

    name: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    outputs: tuple[pathlib.Path, ...]
    run: Callable[[], Mapping[str, Any]]
    follows: bool = False

    def input_hashes(self) -> dict[str, str]:
        """Returns a hash of the content of each input, wherever it is stored."""
        return {name: _hash_of(place) for name, place in self.inputs.items()}


def make_stages(cfg: RlaifConfig, workdir: pathlib.Path) -> list[Stage]:
    """Returns the stages of a config in order; its paths must be those of `workdir`."""
    makers = (
        synthesis_stage,
        _sft,
        _answers,
        _labels,
        _reward,
        _ppo,
        _evaluation,
        _suites,
        _export,
        _report,
    )
    stages = [maker(cfg, workdir) for maker in makers]
    names = set(cfg.stages) - left_out(cfg)
    return [stage for stage in stages if stage.name in names]


def left_out(cfg: RlaifConfig) -> set[str]:
    """Returns the stages that a config has nothing for."""
    empty = {"synthesis": not cfg.synthesis.kinds, "suites": not cfg.suites.suite}
    return {name for name in empty if empty[name]}


def synthesis_stage(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    """Returns the stage that makes data to train on; it runs before these are read."""
    section, judge = cfg.synthesis, cfg.judge
    outputs = {kind: as_path(placed_in(section.file(kind), workdir)) for kind in section.kinds}

    def make() -> dict[str, Any]:
        openai = reach_judge(judge) if section.teacher == JUDGE else None
        settings = section.taught_by(judge, None if openai is None else openai.model)

        opened = {  # All of them are checked before the first is paid for.
            kind: Synthesis(kind, settings, output, flag=SYNTHESIS_FLAG)
            for kind, output in outputs.items()
        }
        figures: dict[str, Any] = {}
        for kind, synthesis in opened.items():
            print(f"synthesis: {kind}", flush=True)
            found = synthesis.run()
            if not found["rows"]:
                raise ValueError(
                    f"synthesis made no rows of {kind} out of {found['candidates']} candidates:"
                    f" {outputs[kind]}.report.html says why"
                )
            figures[f"rows of {kind}"] = found["rows"]
        return figures

    def run() -> Mapping[str, Any]:
        if is_saved and distributed.count() > 1:
            raise ValueError(
                f"{SYNTHESIS_FLAG}teacher={section.teacher} needs one process, and there are"
                f" {distributed.count()}: make the data by `huatuo synthesize` before"
            )
        return distributed.by_first("synthesis", make) or {}

    is_saved = section.teacher != JUDGE and is_saved_model(section.teacher)
    given = [path for path in (section.seeds, section.table) if path is not None]
    inputs = _files([*given, *section.source, *section.cases, *section.evaluation_sets])
    settings = identity(section)
    if section.teacher == JUDGE:
        settings |= {"judge": judge.model, "judge_by_server": judge.base_url is not None}
    elif is_saved:
        inputs["teacher"] = section.teacher
    return Stage("synthesis", settings, inputs, tuple(outputs.values()), run)


def _sft(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    model = cfg.sft.model
    inputs = _files(path for source in cfg.sft.data.sources for path in source.paths)
    if model.directory is not None:
        inputs["initial model"] = model.directory

    def run() -> Mapping[str, Any]:
        if cfg.evaluation.base == f"{workdir}/base/model":
            _save_base(cfg, workdir / "base" / "model")
        return run_sft(cfg.sft, workdir, after_evaluation=_reports_so_far(cfg, workdir))

    return Stage(
        "sft",
        identity(cfg.sft),
        inputs | {"tokenizer": model.tokenizer_source},
        (workdir / "sft" / "model",),
        run,
    )


def _answers(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    section, output = cfg.answers, workdir / "answers.jsonl"
    bulk = BulkConfig(
        model=section.model,
        prompts=section.prompts,
        output=str(output),
        template=cfg.sft.data.template,
        default_system=cfg.sft.data.default_system,
        num_samples=section.num_samples,
        sampling=section.sampling,
        seed=section.seed,
        chunk_size=section.chunk_size,
        slots=section.slots,
        drop_oldest_turns=True,
        max_left_out_share=section.max_left_out_share,
        mesh=section.mesh,
    )

    def run() -> Mapping[str, Any]:
        report = run_bulk(
            bulk,
            lambda done: print(f"  {done}", file=sys.stderr, flush=True),
            lambda line: print(f"answers: {line}", flush=True),
        )
        found = {} if report is None else {"tokens_per_s": report.tokens_per_s}
        return answer_figures(output) | found

    inputs = {"model": section.model, "prompts": section.prompts}
    return Stage("answers", identity(section), inputs, (output,), run)


def answer_figures(path: pathlib.Path) -> dict[str, float]:
    """Counts prompts, answers and tokens of an answers file, and ended and empty answers."""
    prompts = answers = tokens = stopped = empty = 0
    for line in read_lines(path, unfinished="read"):
        prompts += 1
        for one in line.row["answers"]:
            answers += 1
            tokens += len(one["token_ids"])
            stopped += one["finish_reason"] == "stop"
            empty += is_empty(one["text"])
    return {
        "prompts": prompts,
        "answers": answers,
        "tokens_per_answer": tokens / answers,
        "stopped": stopped / answers,
        "empty": empty / answers,
    }


def _labels(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    section, judge, offline = cfg.labels, cfg.judge, cfg.judge.offline
    assert offline != "auto", "with_offline_judge puts one in its place"
    output, comparisons = workdir / LABELS_FILE, workdir / "comparisons.jsonl"

    def ask() -> None:
        run_labels(
            LabelRun(
                answers=section.answers,
                output=str(output),
                openai=reach_judge(judge),
                offline=offline,
                clinic_judge=judge.clinic_judge,
                label=section.label,
                comparisons=str(comparisons),
                comparison=section.comparison,
            ),
            lambda line: print(f"  {line}".replace("\n", "\n  "), flush=True),
        )

    def run() -> Mapping[str, Any]:
        distributed.by_first("labels", ask)
        return {"comparisons": sum(1 for _ in read_lines(comparisons, unfinished="read"))}

    outputs = (output, comparisons, as_path(report_path(output)))
    settings = identity(section) | {"judge": identity(judge)}
    return Stage("labels", settings, {"answers": section.answers}, outputs, run)


def _reward(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    section = cfg.reward
    paths = [path for source in section.data.sources for path in source.paths]
    inputs = _files([*paths, *(path for probe in section.probes for path in probe.paths)])
    return _trained("reward", cfg, workdir, inputs, run_reward)


def _ppo(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    section = cfg.ppo
    inputs = _files(section.data.paths)
    if section.judging is not None and section.judging.prompts is not None:
        inputs["judged prompts"] = section.judging.prompts
    inputs["reward model"] = section.reward_model
    return _trained("ppo", cfg, workdir, inputs, run_ppo)


def _trained(
    name: Literal["reward", "ppo"],
    cfg: RlaifConfig,
    workdir: pathlib.Path,
    inputs: dict[str, str],
    run: Callable[..., Mapping[str, Any]],
) -> Stage:
    section: RewardConfig | PpoConfig = getattr(cfg, name)
    if section.model.directory is not None:
        inputs["model"] = section.model.directory
    outputs = (workdir / name / "model",)
    after = _reports_so_far(cfg, workdir)
    return Stage(
        name,
        identity(section),
        inputs,
        outputs,
        lambda: run(section, workdir, after_evaluation=after),
    )


def _evaluation(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    section, output = cfg.evaluation, workdir / "evaluation.json"
    assert section.base is not None

    def run() -> Mapping[str, Any]:
        model = open_model(cfg.sft.model, cfg.sft.compute.compute_config())
        with distributed.first_then_others("tokenising"):
            data = open_dialogues(
                cfg.sft.data,
                model.load_tokenizer("sft", cfg.sft.data.chat_template),
                seed=cfg.sft.seed,
                default_cache=workdir / "data",
            )
        mesh = cfg.sft.mesh.make()
        # As many rows as fine-tuning evaluated, so that its figures come out the same.
        sft = settled_config(cfg.sft, model, data, mesh, workdir)
        found = run_evaluation(
            section,
            workdir / "evaluation",
            data=data,
            compute=cfg.sft.compute.compute_config(),
            mesh=mesh,
            loss_rows=sft.rows_at_once,
            loss_chunk=cfg.sft.compute.loss_chunk,
            rollout_temperature=cfg.ppo.rollout.temperature,
        )
        distributed.by_first("evaluation", lambda: write_json(output, found))
        return _main_figures(found)

    names = ("base", "sft", "ppo", "reward", "prompts")
    inputs = {name: getattr(section, name) for name in names}
    return Stage("evaluation", identity(section), inputs, (output,), run)


def _main_figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    gain = evaluation["differences"]["ppo_over_sft"]["reward"]
    figures = {} if gain is None else {f"reward_gain_{name}": gain[name] for name in gain}
    divergence = evaluation["kl"]["per_sequence"]
    if divergence is not None:
        figures["kl_per_sequence"] = divergence["value"]
    return figures


def _suites(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    section, folder = cfg.suites, workdir / "suites"

    def evaluate() -> Mapping[str, Any]:
        result = SuiteRun(section, cfg.suite_models, folder, flag=SUITES_FLAG).evaluate()
        write_page(result, folder / PAGE_FILE)
        return {
            f"{one.words}: {model}": None if found is None else found["value"]
            for one in main_figures(result)
            for model, found in one.by_model.items()
        }

    def run() -> Mapping[str, Any]:
        return distributed.by_first("suites", evaluate) or {}

    models = {name: one.source for name, one in cfg.suite_models.items() if not one.by_server}
    files = given_files(section.files) | given_files(section.examples)
    given = [path for paths in files.values() for path in paths]
    inputs = {f"model {name}": source for name, source in models.items()}
    inputs |= _files([*given, *section.ratings, *section.training_data])
    outputs = (folder / RESULTS_FILE, folder / PAGE_FILE)
    return Stage("suites", identity(section), inputs, outputs, run, follows=True)


def _export(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    section, folder = cfg.export, workdir / "export"
    evaluation = workdir / "evaluation.json" if "evaluation" in cfg.stages else None
    policy = cfg.exported_policy
    inputs = {"reward": section.reward}
    if policy is None:
        inputs |= {str(name): place for name, place in cfg.candidates.items()}
    else:
        inputs["policy"] = policy
    if evaluation is not None:
        inputs["evaluation"] = str(evaluation)
    if cfg.suites.suite and "suites" in cfg.stages:
        inputs["suites"] = str(workdir / "suites" / RESULTS_FILE)
    outputs = (folder / "policy", folder / "reward", folder / RELEASE_FILE)

    def run() -> Mapping[str, Any]:
        def export() -> Mapping[str, Any]:
            return run_export(cfg, choose_policy(cfg, evaluation), folder)

        return distributed.by_first("export", export) or {}

    sampling = dataclasses.asdict(sampling_of(cfg.evaluation))
    settings = identity(section) | {"policy": section.choice, "sampling": sampling}
    return Stage("export", settings, inputs, outputs, run, follows=True)


def _reports_so_far(cfg: RlaifConfig, workdir: pathlib.Path) -> Callable[[], None] | None:
    """Returns a function that writes the report of an unfinished run; None without a report.

    Training goes on if the report cannot be written; the error is printed in one line.
    """
    if "report" not in cfg.stages:
        return None

    def write() -> None:
        try:
            _write_report(cfg, workdir)
        except (ValueError, OSError) as error:
            tell(f"report: not written, {error}; the next evaluation tries again")

    return write


def _write_report(cfg: RlaifConfig, workdir: pathlib.Path) -> None:
    output = workdir / REPORT_FILE
    write_report(workdir, output, title=cfg.report.title, num_prompts=cfg.report.num_prompts)


def _report(cfg: RlaifConfig, workdir: pathlib.Path) -> Stage:
    output = workdir / REPORT_FILE

    def run() -> Mapping[str, Any]:
        distributed.by_first("report", lambda: _write_report(cfg, workdir))
        return {"bytes": output.stat().st_size}

    return Stage("report", identity(cfg.report), {}, (output,), run)


def _save_base(cfg: RlaifConfig, target: pathlib.Path) -> None:
    """Saves the model that fine-tuning begins with, its tokenizer and template."""
    if is_written(target):
        return
    model = open_model(cfg.sft.model, cfg.sft.compute.compute_config())
    # Any optimizer will do: none of its state is kept.
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1.0), num_steps=1)
    state = model.make_state(jax.random.key(cfg.sft.seed), optimizer, cfg.sft.mesh.make())
    template = cfg.sft.data.chat_template
    tokenizer = model.load_tokenizer("sft", template)
    model.save(state.variables, target, template=template, tokenizer=tokenizer)


def _files(paths: Iterable[str]) -> dict[str, str]:
    """Maps files by name, numbering equal ones: a run's folder may be moved."""
    found: dict[str, str] = {}
    for path in paths:
        name = pathlib.Path(path).name
        number = sum(one == name or one.startswith(f"{name} #") for one in found)
        found[f"{name} #{number + 1}" if number else name] = path
    return found


def _hash_of(place: str) -> str:
    path = as_path(place)
    if path.is_file():
        return content_hash(path)
    if path.is_dir():
        return models.fingerprint(path)
    return place

"""Compare models on exams, patients' questions and consultations: figures and a page."""

import dataclasses

from huatuo_jax.core.files import as_path
from huatuo_jax.evaluation.comparing_suites import HUMAN_FOLDER
from huatuo_jax.evaluation.opening import ModelChoice, short_names
from huatuo_jax.evaluation.suite_run import PAGE_FILE, RESULTS_FILE, SuiteRun
from huatuo_jax.evaluation.suite_settings import SuiteSettings, check_once
from huatuo_jax.report.evaluation_page import write_page
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE, Interrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(SuiteSettings):
    """Compare models on exams, patients' questions and consultations: figures and a page.

    Exit code 75: stopped (SIGTERM, Ctrl-C); the same command resumes, and pays for nothing twice.

    Attributes:
        model: folders or Hub ids, or openai:NAME for a model behind a server.
        output: folder of results; a run that was killed resumes there.
        names: of the models in tables, in their order; none for the ends of their paths.
        dry_run: tell the number of requests, tokens and cost; nothing is sent or computed.
    """

    model: tuple[str, ...]
    suite: tuple[str, ...] = dataclasses.field()
    output: str
    names: tuple[str, ...] = ()
    dry_run: bool = False


def main(flags: Flags) -> None:
    """Evaluates, and says where figures and page are."""
    output = as_path(flags.output)
    run = SuiteRun(flags, _models(flags), output, dry=flags.dry_run)
    if flags.dry_run:
        for line in run.plan():
            print(line)
        print("nothing was sent or computed; unreadable replies are asked for twice more")
        return
    try:
        result = run.evaluate()
    except Interrupted as stopped:
        print(f"evaluate: {stopped}", flush=True)
        raise SystemExit(INTERRUPTED_EXIT_CODE) from None
    write_page(result, output / PAGE_FILE)
    if flags.human:
        folder = output / HUMAN_FOLDER
        print(f"page for doctors: {folder / 'human.html'}; keep {folder / 'human_key.json'} back")
    print(f"written: {output / RESULTS_FILE}, {output / PAGE_FILE}")


def _models(flags: Flags) -> dict[str, ModelChoice]:
    """The models by their names in tables."""
    for field in ("model", "names"):
        check_once(getattr(flags, field), name=f"--{field}")
    if flags.names and len(flags.names) != len(flags.model):
        raise ValueError(f"--names has {len(flags.names)} for {len(flags.model)} models")
    names = flags.names or short_names(flags.model)
    return {name: ModelChoice(one) for name, one in zip(names, flags.model, strict=True)}

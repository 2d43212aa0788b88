"""Run the training stages of a config, or the whole recipe; run again, it resumes."""

import dataclasses
from collections.abc import Callable
from typing import Any

from huatuo_jax import multi_host
from huatuo_jax.rlaif.config import RlaifConfig
from huatuo_jax.rlaif.recipe import run_rlaif
from huatuo_jax.stages import STAGES, StagesConfig
from huatuo_jax.training.loop import Diverged
from huatuo_jax.training.preemption import INTERRUPTED_EXIT_CODE, Interrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Run the stages of a config, or the whole recipe; run again, it resumes.

    Finished stages are skipped. Exit code 75: stopped (SIGTERM, Ctrl-C), saved.

    Attributes:
        workdir: the run's folder; made if it does not exist.
    """

    workdir: str


@multi_host.joined()
def main(flags: Flags, config: StagesConfig | RlaifConfig) -> None:
    """Run each stage in order and print its result."""
    for name, run, settings in _runs(config):
        try:
            result = run(settings, flags.workdir)
        except Interrupted as stopped:
            print(f"{name}: {stopped}", flush=True)
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None
        except Diverged as error:
            raise ValueError(f"{name}: {error}") from error
        if multi_host.is_first():
            told = [f"{key}: {result[key]}" for key in ("released", "report") if key in result]
            print(f"{name}: finished in {flags.workdir}: {_summary(result)}", *told, sep="\n")


def _runs(config: Any) -> list[tuple[str, Callable[..., dict[str, Any]], Any]]:
    if isinstance(config, RlaifConfig):
        return [(config.recipe, run_rlaif, config)]
    if not isinstance(config, StagesConfig):
        raise ValueError(
            f"the card's get_config() returns a {type(config).__name__}; it must be a StagesConfig "
            "or an RlaifConfig"
        )
    return [(name, STAGES[name], getattr(config, name)) for name in config.stages]


def _summary(result: dict[str, Any]) -> str:
    """The numbers over all kinds of data, `eval/loss` but not `eval/loss/KIND`."""
    numbers = ((name, value) for name, value in result.items() if isinstance(value, int | float))
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers if name.count("/") < 2)

"""Run the stages that a config names, or the whole recipe, or go on with them.

python launch/train.py --config=configs/rlaif.py --workdir=runs/demo [--config.sft.batch_size=8]
Run again, it resumes and skips finished stages. Exit code 75: stopped (SIGTERM, Ctrl-C), saved.
"""

from collections.abc import Callable
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from huatuo_jax import command_line, multi_host
from huatuo_jax.dpo import stage as dpo
from huatuo_jax.ppo import stage as ppo
from huatuo_jax.reward import stage as reward
from huatuo_jax.rlaif.recipe import run_rlaif
from huatuo_jax.sft import run_sft
from huatuo_jax.training.loop import Diverged
from huatuo_jax.training.preemption import INTERRUPTED_EXIT_CODE, Interrupted

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with `get_config()`.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; made if it is not there.")
flags.mark_flags_as_required(["config", "workdir"])

STAGES = {"sft": run_sft, "reward": reward.run_reward, "dpo": dpo.run_dpo, "ppo": ppo.run_ppo}


@multi_host.joined()
def main() -> None:
    """Run each stage in order and say what came out."""
    for name, run, settings in _runs(_CONFIG.value):
        try:
            result = run(settings, _WORKDIR.value)
        except Interrupted as stopped:
            print(f"{name}: {stopped}", flush=True)
            raise SystemExit(INTERRUPTED_EXIT_CODE) from None
        except Diverged as error:
            raise ValueError(f"{name}: {error}") from error
        if multi_host.is_first():
            told = [f"{key}: {result[key]}" for key in ("released", "report") if key in result]
            print(f"{name}: finished in {_WORKDIR.value}: {_summary(result)}", *told, sep="\n")


def _runs(config: ConfigDict) -> list[tuple[str, Callable[..., dict[str, Any]], ConfigDict]]:
    if "recipe" in config:
        return [(config.recipe, run_rlaif, config)]
    if unknown := [name for name in config.stages if name not in STAGES]:
        raise ValueError(f"config.stages names {unknown}; there are {list(STAGES)}")
    return [(name, STAGES[name], config[name]) for name in config.stages]


def _summary(result: dict[str, Any]) -> str:
    """The numbers over all kinds of data, `eval/loss` but not `eval/loss/KIND`."""
    numbers = ((name, value) for name, value in result.items() if isinstance(value, int | float))
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers if name.count("/") < 2)


if __name__ == "__main__":
    command_line.run(main)

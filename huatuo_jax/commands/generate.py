"""Answer a file of prompts in bulk; run again after a kill, it resumes."""

from huatuo_jax import multi_host
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.progress import tell

Flags = BulkConfig


@multi_host.joined()
def main(flags: BulkConfig) -> None:
    """Generate, and print how it went."""
    report = run_bulk(flags, lambda progress: tell(str(progress)))
    if multi_host.is_first():
        print(report or "nothing left to do", f"written: {flags.output}", sep="\n")

"""The XLA flags that tests run with, as far as the installed library knows them.

Run as a script, it prints them for the shell.
"""

import os
import subprocess
import sys

# Tests compile much and compute little: programs are not optimized, and XLA before 2026 compiles
# twice as fast without its newer emitters of fusions, which later versions always use.
OPTIMIZATION = "--xla_backend_optimization_level=0"
OLDER_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
# Each of two workers has one core, so a program that is compiled in parts only has more of them.
ONE_PART = "--xla_cpu_parallel_codegen_split_count=1"
# On a loaded machine 8 virtual devices may wait long for each other, which XLA takes for a deadlock
# after 40 s and ends the process.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=1200"


def known(*flags: str) -> str:
    """Those of the flags that XLA knows, as a value of XLA_FLAGS.

    XLA ends a process that starts with a flag it does not know, so a process of its own is asked.
    """

    def are_known(some: tuple[str, ...]) -> bool:
        asked = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={**os.environ, "XLA_FLAGS": " ".join(some), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            check=False,
        )
        return asked.returncode == 0

    # Mostly all are, which takes one question.
    return " ".join(flags if are_known(flags) else [one for one in flags if are_known((one,))])


def for_tests() -> str:
    """The value of XLA_FLAGS for the tests."""
    return known(OPTIMIZATION, OLDER_EMITTERS, ONE_PART, PATIENCE)


if __name__ == "__main__":
    print(for_tests())

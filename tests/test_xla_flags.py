"""The flags that tests set are those that the installed XLA knows, whatever its version."""

import os
import subprocess
import sys

from tests import xla_flags


def test_a_flag_that_xla_does_not_know_is_left_out():
    unknown = "--xla_no_such_flag=1"
    assert xla_flags.known(xla_flags.OPTIMIZATION, unknown) == xla_flags.OPTIMIZATION


def test_a_process_starts_with_the_flags_of_the_tests():
    subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=True,
        capture_output=True,
    )
    assert xla_flags.OPTIMIZATION in os.environ["XLA_FLAGS"].split()

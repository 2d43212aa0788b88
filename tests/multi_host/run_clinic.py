"""Processes that need a clinic: `run_clinic.py SHARED_FOLDER`; each says what it finds."""

import json
import pathlib

from huatuo_jax.clinic import files
from huatuo_jax.core import distributed
from huatuo_jax.sft import write_clinic_of
from tests.multi_host.arguments import run
from tests.recipe.tiny import CLINIC


@distributed.joined()
def main(arguments):
    workdir = pathlib.Path(arguments[0])
    if not distributed.is_first():  # Only the first one may write.
        files._write = None
    write_clinic_of(workdir, CLINIC)
    settings = json.loads((workdir / "clinic" / files.SETTINGS_FILE).read_text())
    found = [name for name in settings["files"] if (workdir / "clinic" / name).is_file()]
    print(f"found {len(found)} of {len(settings['files'])}", flush=True)


if __name__ == "__main__":
    run(main)

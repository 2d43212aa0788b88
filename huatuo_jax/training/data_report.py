"""Says before a stage's first step what it trains on and what is left out, and keeps it."""

import json

from huatuo_jax import multi_host
from huatuo_jax.atomic import write_file
from huatuo_jax.data.accounting import Account
from huatuo_jax.training.run_directory import StageDirectory

DATA_FILE = "data.json"


def report_data(directory: StageDirectory, account: Account) -> None:
    """Prints an account of the stage's data and writes it to `STAGE/data.json`.

    Of several processes, the first one does.
    """
    if not multi_host.is_first():
        return
    for line in account.lines():
        print(f"{directory.name}: {line}", flush=True)
    text = json.dumps(account.to_json(), ensure_ascii=False, indent=2)
    write_file(directory.folder / DATA_FILE, f"{text}\n")

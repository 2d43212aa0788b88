"""The server under load, beside its peers: tokens per second, times to tokens, memory.

The same questions with the same weights, greedily and in float32, on the same cores, load generator
included. First each question is asked alone; every later answer has to be the same text. Then a
number of clients ask one question after the other (closed loop), and our engine answers the same
ones in bulk, without a server. At last questions come at random times at a share of that rate,
whether or not earlier ones are answered (open loop), for as long as `--minutes` says. `transformers
serve` is asked by a few clients in a closed loop, and so is vLLM where `--vllm_python` names the
interpreter of an environment that has its CPU build.

    python benchmarks/serve.py --clients=64 --minutes=10
"""

import asyncio
import contextlib
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np
from absl import app, flags, logging

_SIZE = flags.DEFINE_string("size", "10m", "Model: 10m, 50m, tiny.")
_CLIENTS = flags.DEFINE_integer("clients", 64, "Clients of the closed loop.", lower_bound=1)
_FEW = flags.DEFINE_integer("few", 16, "Clients of the comparison with peers.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Times that each question is asked.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", 10.0, "Of the open loop; 0 for none.")
_SHARE = flags.DEFINE_float("share", 0.8, "Of the closed loop's rate, in the open loop.")
_PEERS = flags.DEFINE_list("peers", ["transformers"], "Peers to ask.")
_SLOTS = flags.DEFINE_integer("slots", 32, "Slots of our engine.", lower_bound=1)
_THREADS = flags.DEFINE_integer("threads", 2, "Cores of everything.", lower_bound=1)
_VLLM = flags.DEFINE_string("vllm_python", None, "Interpreter that has vLLM.")
_OUTPUT = flags.DEFINE_string("output", "benchmarks/results/serve_cpu.json", "Where to.")
_BULK = flags.DEFINE_string("bulk", None, "Answer this folder's questions in this process.")

SHAPES = {  # Width, feed-forward width, layers, heads.
    "tiny": (64, 160, 2, 2),
    "10m": (256, 704, 8, 4),
    "50m": (512, 1408, 14, 8),
}
QUESTIONS = 64
LENGTHS = (16, 96)  # Tokens of an answer.
MAX_LENGTH = 512
SEED = 0
ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = "头痛 发热 咳嗽 三天 两周 怎么办 老人 孩子 夜里 加重 吃药 没有 好转 需要 检查 吗".split()


class Asked(NamedTuple):
    """An answer over HTTP.

    Attributes:
        text: of it.
        tokens: that were asked for, and given.
        first_s: seconds to its first text.
        gaps_s: seconds between later pieces.
        seconds: to its end.
    """

    text: str
    tokens: int
    first_s: float
    gaps_s: list[float]
    seconds: float


def main(_: list[str]) -> None:
    """Measure ours and the peers, and write the result."""
    logging.set_verbosity(logging.WARNING)
    cores = sorted(os.sched_getaffinity(0))[: _THREADS.value]
    os.sched_setaffinity(0, cores)
    if _BULK.value:
        print(json.dumps(bulk(pathlib.Path(_BULK.value))))
        return
    result: dict[str, Any] = {"size": _SIZE.value, "slots": _SLOTS.value, "cores": len(cores)}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make_model(folder)
        questions = make_questions()
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        result["bulk"] = run_bulk(folder)
        with our_server(folder) as (port, process):
            result["ours"] = measure_ours(port, process, questions)
        result["ours"]["share_of_bulk"] = (
            result["ours"]["closed"]["tokens_per_s"] / result["bulk"]["tokens_per_s"]
        )
        write(result)
        for peer in _PEERS.value:
            with PEERS[peer](folder) as port:
                found = measure(port, peer, questions, clients=_FEW.value, rounds=1)
            found["ours_is_faster_by"] = (
                result["ours"]["few"]["tokens_per_s"] / found["tokens_per_s"]
            )
            result[peer] = found
            write(result)
    print(json.dumps(result, indent=2))


def write(result: dict[str, Any]) -> None:
    """Write what is measured so far."""
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_model(folder: pathlib.Path) -> None:
    """Random weights with a tokenizer and a chat template, whose greedy answers do not end."""
    import jax

    import huatuo_jax as hj
    from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
    from huatuo_jax.backbone.transformer import init_params
    from huatuo_jax.checkpoint.models import save_orbax
    from huatuo_jax.data import SAMPLE_FOLDER
    from huatuo_jax.hf.tokenizer import load_tokenizer

    width, wide, layers, heads = SHAPES[_SIZE.value]
    tokenizer = load_tokenizer(SAMPLE_FOLDER / "tokenizer")
    cfg = BackboneConfig(
        family="llama",
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=wide,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_positions=MAX_LENGTH,
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


def bulk(folder: pathlib.Path) -> dict[str, Any]:
    """Our engine alone, on the same prompts in the same number of rounds."""
    from huatuo_jax.backbone.config import ComputeConfig
    from huatuo_jax.core.sharding import MeshConfig
    from huatuo_jax.data.python_data import as_prompt
    from huatuo_jax.generation.requests import Request, SamplingConfig
    from huatuo_jax.generation.saved_model import open_saved_model

    saved = open_saved_model(str(folder / "model"), head="lm", mesh=MeshConfig())
    engine = saved.make_engine(
        saved.load_params(), ComputeConfig(), slots=_SLOTS.value, max_length=MAX_LENGTH
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
    ] * _ROUNDS.value
    engine.generate_in_order(work)
    engine.reset_report()
    started_s = time.perf_counter()
    answers = engine.generate_in_order(work)
    seconds = time.perf_counter() - started_s
    tokens = sum(len(group[0].token_ids) for group in answers)
    return {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}


def run_bulk(folder: pathlib.Path) -> dict[str, Any]:
    """The figures of `bulk`, in a process of its own."""
    command = [sys.executable, __file__, f"--bulk={folder}", f"--slots={_SLOTS.value}"]
    command += [f"--rounds={_ROUNDS.value}", f"--threads={_THREADS.value}"]
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def environment() -> dict[str, str]:
    """That of all processes."""
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def our_server(folder: pathlib.Path) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Serves by this project while the context lasts."""
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--port=0"]
    command += [f"--model=ours={folder / 'model'}", f"--slots={_SLOTS.value}"]
    command += ["--max_waiting=100000"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/", line)
        assert found, f"the server did not start: {line}"
        yield int(found[1]), process
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def transformers_server(folder: pathlib.Path) -> Iterator[int]:
    """`transformers serve` while the context lasts."""
    start = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", start, "serve", str(folder / "model"), "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with _peer(command, port) as ready:
        yield ready


@contextlib.contextmanager
def vllm_server(folder: pathlib.Path) -> Iterator[int]:
    """Serves by vLLM while the context lasts."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(_VLLM.value), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder / "model"), "--served-model-name", "vllm"]
    command += ["--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--port", str(port)]
    with _peer(command, port) as ready:
        yield ready


@contextlib.contextmanager
def _peer(command: Sequence[str], port: int) -> Iterator[int]:
    log = tempfile.TemporaryFile()
    process = subprocess.Popen(command, env=environment(), stdout=log, stderr=subprocess.STDOUT)
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"it has ended: {' '.join(command)}: {_end_of(log)}")
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            time.sleep(0.5)
        yield port
    finally:
        process.kill()
        process.wait()
        log.close()


def _end_of(log: IO[bytes]) -> str:
    """The last lines that a process has written."""
    log.seek(0)
    return log.read().decode(errors="replace")[-500:]


PEERS = {"transformers": transformers_server, "vllm": vllm_server}


def measure_ours(
    port: int, process: "subprocess.Popen[str]", questions: list[dict[str, Any]]
) -> dict[str, Any]:
    """Closed loops of few and of many clients, then the open loop."""
    alone = asyncio.run(one_after_another(port, "ours", questions))
    texts = [one.text for one in alone]
    measure(port, "ours", questions, clients=_CLIENTS.value, rounds=1)  # Compiles what is left.
    closed = measure(
        port, "ours", questions, clients=_CLIENTS.value, rounds=_ROUNDS.value, texts=texts
    )
    few = measure(port, "ours", questions, clients=_FEW.value, rounds=1, texts=texts)
    result = {"closed": closed, "few": few}
    if _MINUTES.value:
        rate = _SHARE.value * closed["answers"] / closed["seconds"]
        before = memory_mib(process.pid)
        answers = asyncio.run(open_loop(port, "ours", questions, rate=rate))
        result["open"] = figures(answers, _MINUTES.value * 60, texts, questions) | {
            "asked_per_s": rate,
            "memory_mib": [before, memory_mib(process.pid)],
        }
    return result


def measure(
    port: int,
    model: str,
    questions: list[dict[str, Any]],
    *,
    clients: int,
    rounds: int,
    texts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """A closed loop, after one answer to warm up."""
    asyncio.run(one_after_another(port, model, questions[:1]))
    started_s = time.perf_counter()
    answers = asyncio.run(closed_loop(port, model, questions, clients=clients, rounds=rounds))
    found = figures(answers, time.perf_counter() - started_s, texts, questions)
    return found | {"clients": clients}


def figures(
    answers: Sequence[tuple[int, Asked]],
    seconds: float,
    texts: Sequence[str] | None,
    questions: list[dict[str, Any]],
) -> dict[str, Any]:
    """Rates, times in milliseconds, and the number of answers that are not those of one alone."""
    tokens = sum(one.tokens for _, one in answers)
    first, gaps = [one.first_s for _, one in answers], [s for _, one in answers for s in one.gaps_s]
    found = {
        "answers": len(answers),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "first_text_ms": _percentiles(first),
        "between_pieces_ms": _percentiles(gaps),
        "whole_answer_ms": _percentiles([one.seconds for _, one in answers]),
    }
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
    port: int, model: str, questions: list[dict[str, Any]], *, clients: int, rounds: int
) -> list[tuple[int, Asked]]:
    """Clients that each ask the next question as soon as they have an answer."""
    waiting = iter([*range(len(questions))] * rounds)
    answers: list[tuple[int, Asked]] = []

    async def client() -> None:
        for number in waiting:
            answers.append((number, await ask(port, model, questions[number])))

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def open_loop(
    port: int, model: str, questions: list[dict[str, Any]], *, rate: float
) -> list[tuple[int, Asked]]:
    """Questions at random times, as many a second as `rate`, on average."""
    generator = random.Random(SEED)
    answers: list[tuple[int, Asked]] = []
    tasks: set[asyncio.Task[None]] = set()

    async def one(number: int) -> None:
        answers.append((number, await ask(port, model, questions[number])))

    started_s = next_s = time.perf_counter()
    while next_s < started_s + 60 * _MINUTES.value:
        await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        tasks.add(asyncio.create_task(one(generator.randrange(len(questions)))))
        next_s += generator.expovariate(rate)
    await asyncio.gather(*tasks)
    return answers


async def ask(port: int, model: str, question: dict[str, Any]) -> Asked:
    """Asks a question and reads the stream of its answer."""
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
    text, times_s, over = "", [], False
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                piece = choice["delta"].get("content") or ""
                over = over or choice.get("finish_reason") is not None
                if piece:
                    text += piece
                    times_s.append(time.perf_counter())
    writer.close()
    assert over, f"no end of the answer to {question['text']!r}: {text!r}"
    ended_s = time.perf_counter()
    first_s = (times_s[0] if times_s else ended_s) - started_s
    gaps_s = [after - before for before, after in zip(times_s, times_s[1:], strict=False)]
    return Asked(text, question["tokens"], first_s, gaps_s, ended_s - started_s)


def memory_mib(process_id: int) -> float:
    """The memory that a process has in use."""
    status = pathlib.Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


if __name__ == "__main__":
    app.run(main)

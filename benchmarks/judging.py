"""A judge inside PPO's loop: an iteration whose judging goes on meanwhile beside one that waits.

A judge behind a local server takes its time for each of an iteration's answers. In the first case
generation is longer than judging, as few answers are sampled at once; in the second a verdict takes
as long as a language model's, and judging is longer. `meanwhile` is the loop as it is: answers are
judged as they finish, and while log-probabilities are computed. `afterwards` has the same function
without the mark `one_by_one`: it is called when all answers are there, so that generation and
judging follow each other. Both go through the same answers and the same verdicts. Seconds are
medians over iterations without the first two, which compile.

    python launch/train.py --config=configs/rewards.py:diagnosis --workdir=runs/rewards/diagnosis
    python benchmarks/judging.py --run=runs/rewards/diagnosis
"""

import asyncio
import dataclasses
import hashlib
import http.server
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import jax
from absl import app, flags

from huatuo_jax.core.config import load_card
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.ppo.reward_terms import RewardMixConfig, RewardTerm
from huatuo_jax.ppo.stage import run_ppo
from huatuo_jax.reward_functions.graded import verified
from huatuo_jax.reward_functions.grader import Grader, GraderConfig
from huatuo_jax.training.metrics import read_rows

RESULT = pathlib.Path(__file__).resolve().parent / "results" / "judging_cpu.json"
WAYS = {
    "meanwhile": "huatuo_jax.reward_functions.graded:verified",
    "afterwards": f"{__file__}:verified_afterwards",
}
CASES: Mapping[float, int | None] = {0.05: 4, 1.0: None}
"""By the seconds of a verdict in the mean, each of which takes between a half and one and a half of
it: the answers sampled at once."""
CONCURRENCY = GraderConfig().concurrency
ITERATIONS = 4
WITHOUT = 2

Figures = dict[str, Any]


async def verified_afterwards(
    prompts: Sequence[Any],
    responses: Sequence[str],
    *,
    grader: Grader,
    reference: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """`graded:verified` of all responses at once."""
    found = await asyncio.gather(
        *(
            verified([prompt], [response], grader=grader, reference=[one], form="any")
            for prompt, response, one in zip(prompts, responses, reference, strict=True)
        )
    )
    return [reward for (reward,) in found]


class Judge(http.server.BaseHTTPRequestHandler):
    """Verdicts that are a function of the question, after the seconds that its model is named."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answers a question."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        draw = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
        time.sleep(float(body["model"]) * (0.5 + draw[0] / 255))
        message = {"role": "assistant", "content": json.dumps({"correct": draw[1] < 128})}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        self._send({"choices": [choice], "usage": usage, "model": body["model"]})

    def do_GET(self) -> None:
        """Lists the models."""
        self._send({"data": [{"id": f"{delay_s}"} for delay_s in CASES]})

    def log_message(self, *_: Any) -> None:
        """Logs nothing."""

    def _send(self, content: Mapping[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def serve(told: Connection) -> None:
    """Serves on a free port, which it tells."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    told.send(server.server_port)
    server.serve_forever()


def main(run: str) -> None:
    """Measures each delay in both ways, and writes the file."""
    os.environ.setdefault("OPENAI_API_KEY", "none")
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}/v1"
        with tempfile.TemporaryDirectory() as compiled:  # Both ways run the same programs.
            jax.config.update("jax_compilation_cache_dir", compiled)
            delays = {f"{delay_s}": measure(run, url, delay_s) for delay_s in CASES}
    finally:
        server.terminate()
    found = {
        "cores": len(os.sched_getaffinity(0)),
        "concurrency": CONCURRENCY,
        "iterations": ITERATIONS - WITHOUT,
        "delays": delays,
    }
    RESULT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def measure(run: str, url: str, delay_s: float) -> Figures:
    """The seconds of both ways, and how generation with judging compares to the longer of them."""
    found = {}
    for way, function in WAYS.items():
        with tempfile.TemporaryDirectory() as workdir:
            run_ppo(config(run, url, delay_s, function), workdir)
            found[way] = read_rows(pathlib.Path(workdir) / "ppo" / "metrics.jsonl")
    return figures(**found)


def figures(
    meanwhile: Sequence[Mapping[str, float]], afterwards: Sequence[Mapping[str, float]]
) -> Figures:
    """What the metrics of both runs say."""
    scores = [[row["ppo/score"] for row in rows] for rows in (meanwhile, afterwards)]
    assert scores[0] == scores[1], "both have the same answers and verdicts"
    of_one, of_other = seconds(meanwhile[WITHOUT:]), seconds(afterwards[WITHOUT:])
    generation, judging = of_other["generation"], of_other["scoring"]
    both = of_one["generation"] + of_one["judging"] + of_one["scoring"]
    longer = max(generation, judging)
    return {
        "meanwhile": of_one,
        "afterwards": of_other,
        "generation_s": generation,
        "judging_s": judging,
        "both_s": both,
        "iteration_over_longer": of_one["step"] / longer,
        "both_over_longer": both / longer,
        "sum_over_longer": (generation + judging) / longer,
    }


def config(run: str, url: str, delay_s: float, function: str) -> Any:
    """The card's PPO with a judge at an address."""
    ppo = load_card(f"configs/rewards.py:diagnosis,{run}").ppo
    term = RewardTerm(
        of=function,
        name="verified",
        settings={"form": "any"} if function == WAYS["meanwhile"] else {},
    )
    judge = JudgeConfig(base_url=url, model=f"{delay_s}")
    return dataclasses.replace(
        ppo,
        reward=RewardMixConfig(
            terms=(term,), grader=GraderConfig(judge=judge, concurrency=CONCURRENCY)
        ),
        rollout=dataclasses.replace(ppo.rollout, slots=CASES[delay_s]),
        held_out_rewards=None,
        num_iterations=ITERATIONS,
    )


def seconds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Medians by what they were spent on."""
    parts = ("generation", "judging", "scoring", "log_probs", "update", "step")
    return {
        part: statistics.median(row.get(f"throughput/{part}_s", 0.0) for row in rows)
        for part in parts
    }


if __name__ == "__main__":
    # Not where the loop imports this file for its function.
    _RUN = flags.DEFINE_string("run", "runs/rewards/diagnosis", "Folder of a run with a model.")
    flags.register_validator(
        _RUN.name,
        lambda run: pathlib.Path(run).is_dir(),
        "no such folder: see benchmarks/rewards.py",
    )
    app.run(lambda _: main(_RUN.value))

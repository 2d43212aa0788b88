"""One turn of a contender of `exams.py`: answers all questions twice, times both, prints JSON.

python benchmarks/exams_contenders.py NAME FOLDER THREADS
"""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

OURS = "ours"
HARNESS = "ours in lm-eval"
TORCH = "torch in lm-eval, batch "  # Behind it stands the number of requests of a batch.

Run = Callable[[], list[list[float]]]


def our_evaluator(folder: pathlib.Path, files: dict[str, str]) -> Run:
    """Our evaluator: prompts, tokens, scores."""
    from huatuo_jax.evaluation.exam_prompts import PUBLISHED_FORMS, likelihood_prompt
    from huatuo_jax.evaluation.exam_sets import read_subject_folder
    from huatuo_jax.evaluation.respondents import DecodingConfig, SavedRespondent

    respondent = SavedRespondent(os.fspath(folder / "model"), DecodingConfig())

    def run() -> list[list[float]]:
        found = read_subject_folder(files["cmmlu"], exam="cmmlu", split="test")
        prompts = [likelihood_prompt(one, PUBLISHED_FORMS["cmmlu"]) for one in found.questions]
        asked = [(one.context, one.continuations) for one in prompts]
        return [list(one) for one in respondent.option_log_probs(asked)]

    return run


def in_lm_eval(model: Any, files: dict[str, str]) -> Run:
    """A model of lm-evaluation-harness on our task file."""
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    from huatuo_jax.evaluation.harness.model import TASKS

    def run() -> list[list[float]]:
        manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=files)
        # Not `simple_evaluate`, which also looks up what is installed.
        found = evaluate(model, manager.load(["huatuo_cmmlu"]), bootstrap_iters=0)
        samples = found["samples"]["huatuo_cmmlu"]
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        return [[float(value) for value, _ in one["filtered_resps"]] for one in ordered]

    return run


def contender(name: str, folder: pathlib.Path, files: dict[str, str], threads: int) -> Run:
    """What a contender runs."""
    if name == OURS:
        return our_evaluator(folder, files)
    if name == HARNESS:
        from huatuo_jax.evaluation.harness.model import HuatuoLM

        return in_lm_eval(HuatuoLM(os.fspath(folder / "model")), files)
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(threads)
    batch_size = int(name.removeprefix(TORCH))
    model = HFLM(os.fspath(folder / "model"), dtype="float32", device="cpu", batch_size=batch_size)
    return in_lm_eval(model, files)


def main(arguments: Sequence[str]) -> None:
    """Runs twice; the first time whatever is compiled is compiled."""
    name, folder, threads = arguments[0], pathlib.Path(arguments[1]), int(arguments[2])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    files = json.loads((folder / "files.json").read_text(encoding="utf-8"))
    run = contender(name, folder, files, threads)
    seconds, cpu_seconds = [], []
    for _ in range(2):
        start, cpu_start = time.perf_counter(), time.process_time()
        log_probs = run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    print(
        json.dumps(
            {
                "first_seconds": seconds[0],
                "seconds": seconds[1],
                "cpu_seconds": cpu_seconds[1],
                "log_probs": log_probs,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])

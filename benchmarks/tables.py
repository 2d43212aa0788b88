"""Tables of the README and of the pages in `docs/`, made of the figures in `benchmarks/results/`.

Where new results are written, this writes them into the pages:

    python benchmarks/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is one of `TABLES`.
"""

import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
CONTENDERS = {
    "ours": "huatuo_jax",
    "torch_packed": "PyTorch loop, packed rows",
    "torch_padded": "PyTorch loop, padded rows",
    "trl_packed": "TRL, packed rows",
    "trl_padded": "TRL, padded rows",
    "trl": "TRL",
    "trl_no_checkpointing": "TRL without gradient checkpointing",
    "transformers": "transformers",
    "transformers_batching": "transformers, continuous batching",
    "vllm": "vLLM",
    "ours in lm-eval": "huatuo_jax in lm-evaluation-harness",
    "torch in lm-eval, batch 1": "lm-evaluation-harness with torch, batches of 1",
    "torch in lm-eval, batch 8": "lm-evaluation-harness with torch, batches of 8",
    "torch in lm-eval, batch 32": "lm-evaluation-harness with torch, batches of 32",
}
SPEEDS = {
    "trained_tokens_per_second": "trained tokens/s",
    "pairs_per_second": "pairs/s",
    "iterations_per_second": "iterations/s",
    "tokens_per_s": "tokens/s",
    "questions_per_second": "questions/s",
}
GENERATION = (
    "generation_cpu",
    "generation_cpu_16_slots",
    "generation_cpu_64_slots",
    "generation_cpu_494m",
    "generation_cpu_494m_bfloat16",
)
TASKS = {
    "sft_cpu": "SFT",
    "sft_cpu_bfloat16": "SFT",
    "reward_cpu": "reward model",
    "ppo_cpu": "PPO, responses of 64 tokens",
    "ppo_cpu_answers_that_end": "PPO, responses that end by themselves",
    **{task: "generation" for task in GENERATION},
}
PARTS = ("generation", "scoring", "log_probs", "update")

Figures = dict[str, Any]


def main(_: list[str]) -> None:
    """Writes all tables into their pages, and names the pages that changed."""
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = filled(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")


def pages() -> list[pathlib.Path]:
    """The README and the pages of the site."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with its tables as the results have them now.

    Raises:
        ValueError: it names a table that there is not.
    """

    def table(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"<!-- table: {name} --> must be one of {', '.join(TABLES)}")
        return f"{begin}{TABLES[name]().strip()}\n{end}"

    return PLACE.sub(table, text)


def speed() -> str:
    """A line for each task and size of model: our speed, and that of each peer."""
    rows = []
    for name, size, unit, ours, peers in _contests():
        shown = "<br>".join(
            f"{CONTENDERS[peer]}: {_number(figure)} ({ratio:.2f})" for peer, figure, ratio in peers
        )
        rows.append((f"{name}, {size}", f"{_number(ours)} {unit}", shown))
    return markdown(("task, parameters", "huatuo_jax", "peers (our speed over theirs)"), rows)


def details(*tasks: str) -> str:
    """A line for each contender of some tasks, with its memory and its share of the peak.

    In brackets are the least and the largest ratio of a round. Tasks that have more than one are
    named by their dtype, generation by the slots of our engine too.
    """
    rows = []
    heads: list[str] = []
    for task in tasks:
        for size, contenders in _sizes(_read(task)):
            ours = contenders["ours"]
            settings = {key: str(ours[key]) for key in ("slots", "dtype") if key in ours}
            for name, one in contenders.items():
                unit = next(unit for unit in SPEEDS if unit in one)
                cells = {
                    "parameters": size,
                    **settings,
                    "": CONTENDERS[name],
                    SPEEDS[unit]: _number(one[unit]),
                    "ours is faster by": _ratio(ours, one),
                }
                for key, head, form in (
                    ("peak_memory_mib", "peak memory, MiB", ",.0f"),
                    ("share_of_peak", "share of the peak", ".0%"),
                    ("answer_tokens_per_iteration", "tokens of responses", ",.0f"),
                    ("seconds_per_iteration", "s an iteration", ".1f"),
                    *((part, f"{part.replace('_', '-')}, s", ".1f") for part in PARTS),
                ):
                    if key in one:
                        cells[head] = _formatted(one[key], form)
                heads = [*dict.fromkeys([*heads, *cells])]
                rows.append(cells)
    return markdown(tuple(heads), [[cells.get(head, "") for head in heads] for cells in rows])


def _ratio(ours: Figures, other: Figures) -> str:
    """Our speed over another's, with the least and the largest ratio of several rounds."""
    shown = f"{other['ours_is_faster_by']:.2f}"
    speeds = (ours.get("each_turn", ()), other.get("each_turn", ()))
    rounds = [our / their for our, their in zip(*speeds, strict=True)]
    if ours is other or len(rounds) < 2:
        return shown
    return f"{shown} ({min(rounds):.2f} to {max(rounds):.2f})"


def machine(task: str) -> str:
    """When and on what a contest was measured."""
    found = _read(task)
    return f"{_machine(found)}. Data: {found['data']}."


def hardware(*columns: str) -> str:
    """What each card needs on its devices; without columns, all of them."""
    spec = importlib.util.spec_from_file_location("hardware", ROOT / "benchmarks" / "hardware.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in module.table().strip().splitlines()
    ]
    chosen = [head.index(column) for column in columns or head]
    return markdown(
        tuple(head[place] for place in chosen),
        [tuple(row[place].strip("| ") for place in chosen) for row in rows],
    )


def scaling() -> str:
    """How a step of fine-tuning scales with chips: parts of its time, and speed of a chip."""
    rows, first = [], {}
    for found in _read("scaling").values():
        shares = [found["utilisation"], found["utilisation_without_overlap"]]
        alone = first.setdefault((found["card"], found["rows"]), shares)
        efficiencies = (f"{share / start:.0%}" for share, start in zip(shares, alone, strict=True))
        times = (f"{found[f'{part}_s']:.2f}" for part in ("compute", "memory", "interconnect"))
        rows.append(
            (
                f"`{found['card']}`",
                f"{found['num_slices']} x {found['topology']}",
                str(found["chips"]),
                str(found["rows"]),
                f"{found['memory_gib']:.1f}",
                ", ".join(times),
                " to ".join(f"{share:.0%}" for share in reversed(shares)),
                " to ".join(reversed([*efficiencies])),
            )
        )
    heads = (
        *("config", "slices", "chips", "rows a chip", "GiB a chip"),
        *("s a step: computation, memory, links", "utilisation", "efficiency"),
    )
    return markdown(heads, rows)


def recipe_on_real_data() -> str:
    """The main figures of the whole recipe on real dialogues, with their intervals."""
    found = _read("rlaif_real_data")
    bigram = _read("sft_real_data")["held_out_at_last"]["all"]["bigram_loss"]
    loss, model = found["sft_held_out_loss"], found["reward_model"]
    ppo, control = found["evaluation"], found["length_only"]["evaluation"]
    over, of_control = (one["differences"]["ppo_over_sft"] for one in (ppo, control))
    share = ppo["win_rates"]["ppo_over_sft"]["share"]
    lengths = [ppo["models"][name]["characters"]["value"] for name in ("sft", "ppo")]
    nats = ppo["kl"]["per_sequence"]["value"]
    rows = [
        (
            "held-out loss",
            f"{loss['base']:.2f} before fine-tuning, {loss['sft']:.2f} after; a bigram model of "
            f"the same tokens: {bigram:.2f}",
        ),
        (
            "reward model, accuracy on held-out comparisons",
            f"{_with_interval(model['accuracy'], '.0%')}; length alone: "
            f"{_formatted(model['length_baseline']['accuracy']['value'], '.0%')}",
        ),
        (
            "PPO over SFT, reward model's score",
            f"{_with_interval(over['reward'], '+.2f')}, at {nats:.1f} nats of KL a response",
        ),
        (
            "of it, at equal length",
            f"{_with_interval(ppo['length']['gain_at_equal_length'], '+.2f')}; responses go from "
            f"{lengths[0]:.0f} characters to {lengths[1]:.0f}",
        ),
        ("PPO over SFT, judge asked anew", f"preferred in {_with_interval(share, '.1%')}"),
        (
            "the same PPO with length as its score",
            f"{control['models']['ppo']['characters']['value']:.0f} characters, and "
            f"{_with_interval(of_control['reward'], '+.2f')} of the reward model's score",
        ),
    ]
    return markdown(("", ""), rows)


def reward_on_real_data() -> str:
    """A reward model and a model of the length alone, five-fold, on the same pairs."""
    found = _read("reward_real_data")
    rows = [
        (title, _with_interval(found[key]["accuracy"], ".1%"), f"{found[key]['loss']:.3f}")
        for key, title in (("reward_model", "reward model"), ("length_only", "length alone"))
    ]
    return markdown(("", "accuracy", "loss"), rows)


def sft_on_real_data() -> str:
    """The held-out loss of each kind of dialogue beside that of a bigram model."""
    rows = [
        (kind.replace("_", " "), f"{one['loss']:.2f}", f"{one['bigram_loss']:.2f}")
        for kind, one in _read("sft_real_data")["held_out_at_last"].items()
    ]
    return markdown(("dialogues", "held-out loss", "bigram model"), rows)


def rewards() -> str:
    """What each reward raises on the clinic, beside the fine-tuned model."""
    figures = {"right diagnosis": ".3f", "rubric": ".3f", "tokens": ".1f"}
    rows = []
    for name, of_model in _read("rewards")["models"].items():
        cells = []
        for figure, form in figures.items():
            cell = _with_interval(of_model[figure]["mean"], form)
            if name != "fine-tuned":
                cell += f"<br>{_with_interval(of_model[figure]['difference'], '+' + form)}"
            cells.append(cell)
        rows.append((name if name == "fine-tuned" else f"rewarded for {name}", *cells))
    return markdown(("", "right diagnoses", "rubric", "tokens"), rows)


def judging() -> str:
    """Seconds of an iteration that is judged meanwhile, and of one that is judged afterwards."""
    rows = []
    for delay, one in _read("judging_cpu")["delays"].items():
        of_loop, of_other = one["meanwhile"], one["afterwards"]
        ratios = ("both_over_longer", "iteration_over_longer")
        seconds = (
            one["generation_s"],
            one["judging_s"],
            of_other["step"],
            of_loop["step"],
            one["both_s"],
            of_loop["log_probs"],
            of_loop["update"],
        )
        cells = (*(f"{part:.1f}" for part in seconds), *(f"{one[name]:.2f}" for name in ratios))
        rows.append((f"{float(delay):g}", *cells))
    heads = (
        "seconds a verdict",
        "generation alone",
        "judging alone",
        "iteration, judged afterwards",
        "iteration, in the loop",
        "of it, generation and waiting for verdicts",
        "log-probabilities",
        "update",
        "generation and waiting, over the longer",
        "iteration, over the longer",
    )
    return markdown(heads, rows)


def synthesis() -> str:
    """Held-out loss of students of what the teacher made, and of students of its own rows."""
    found = _read("synthesis")
    rows = [
        (
            kind.replace("_", " "),
            seed,
            f"{one['rows_of_the_teacher']:,} x {one['epochs_of_the_teacher']}",
            f"{one['teacher']:.3f}",
            *(", ".join(f"{loss:.3f}" for loss in one[name]) for name in ("own", "synthesized")),
            f"{one['behind']:+.3f}",
            "" if one["standard_error"] is None else f"{one['standard_error']:.3f}",
            _formatted(one["yield"], ".0%"),
        )
        for kind, seeds in found["kinds"].items()
        for seed, one in seeds.items()
    ]
    rows_seen = "rows of the teacher x epochs"
    heads = (
        "kind",
        "seed",
        rows_seen,
        "teacher",
        "students of its own rows",
        "of synthesized rows",
    )
    return markdown((*heads, "behind by", "standard error", "candidates kept"), rows)


def serving() -> str:
    """The load of many clients beside the bulk engine, and a few clients beside the peers."""
    found = _read("serve_cpu")
    load, parts = found["load"], found["load"]["parts"]
    shares = [part["share_of_bulk"] for part in parts]
    memory = [part["memory_mib"] for part in parts]
    left = sum(part["slots_in_use_after"] + part["pages_in_use_after"] for part in parts)
    times = ", ".join(
        f"{name} {load[key]['p50']:,.0f} and {load[key]['p99']:,.0f}"
        for key, name in (("first_text_ms", "to the first text"), ("between_pieces_ms", "between"))
    )
    rows = [
        (
            f"{load['clients']} clients, {load['seconds'] / 60:.0f} minutes",
            f"{load['answers']:,} answers, {load['clients_that_left']:,} clients left early",
        ),
        ("tokens/s", _number(load["tokens_per_s"])),
        (
            "of the bulk engine's, in turns with it",
            f"{load['share_of_bulk']:.2f} ({min(shares):.2f} to {max(shares):.2f})",
        ),
        (
            "CPU a token, server and clients, beside bulk",
            f"{load['cpu_ms_a_token']:.2f} and {load['bulk_cpu_ms_a_token']:.2f} ms",
        ),
        ("milliseconds, p50 and p99", times),
        ("answers that are not those of one client alone", str(load["other_texts"])),
        ("slots and pages in use when all had left", f"{left:.0f}"),
        ("memory after each part, MiB", ", ".join(f"{one:,.0f}" for one in memory)),
    ]
    rows += [
        (
            f"{one['clients']} clients: {CONTENDERS[name]}",
            f"{_number(one['tokens_per_s'])} tokens/s"
            + (f" ({one['ours_is_faster_by']:.2f})" if "ours_is_faster_by" in one else "")
            + (
                f", {one['failed']} of {one['answers'] + one['failed']} answers failed"
                if one["failed"]
                else ""
            ),
        )
        for name, one in found["peers"]["contenders"].items()
    ]
    return markdown(("", ""), rows)


def served_interface() -> str:
    """The parts of OpenAI's interface that each server has."""
    found = _read("serve_conformance")
    servers = list(next(iter(found["checks"].values())))
    heads = [f"{CONTENDERS[one]} {found['versions'].get(one, '')}".strip() for one in servers]
    rows = [
        (what, *("yes" if has[one] else "no" for one in servers))
        for what, has in found["checks"].items()
    ]
    return markdown(("", *heads), rows)


def serving_machine() -> str:
    """When and on what a few clients asked us and the peers."""
    return f"With the peers: {_machine(_read('serve_cpu')['peers']['machine'])}."


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(heads), *lines[1:]]) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "speed": speed,
    "sft": lambda: details("sft_cpu", "sft_cpu_bfloat16"),
    "reward": lambda: details("reward_cpu"),
    "ppo": lambda: details("ppo_cpu"),
    "ppo_that_ends": lambda: details("ppo_cpu_answers_that_end"),
    "generation": lambda: details(*GENERATION),
    "exams": lambda: details("exams_cpu"),
    "sft_machine": lambda: machine("sft_cpu"),
    "reward_machine": lambda: machine("reward_cpu"),
    "ppo_machine": lambda: machine("ppo_cpu"),
    "rewards": rewards,
    "judging": judging,
    "serving": serving,
    "serving_machine": serving_machine,
    "served_interface": served_interface,
    "exams_machine": lambda: machine("exams_cpu"),
    "hardware": hardware,
    "hardware_short": lambda: hardware(
        "config", "devices", "GiB a device: SFT, reward, PPO", "of", "SFT, tokens/s at most"
    ),
    "scaling": scaling,
    "recipe_on_real_data": recipe_on_real_data,
    "reward_on_real_data": reward_on_real_data,
    "sft_on_real_data": sft_on_real_data,
    "synthesis": synthesis,
}


def _contests() -> Iterator[tuple[str, str, str, float, list[tuple[str, float, float]]]]:
    """Task, size, unit of speed, our speed, and each peer with its speed and our ratio to it."""
    for task in TASKS:
        for size, contenders in _sizes(_read(task)):
            unit = next(unit for unit in SPEEDS if unit in contenders["ours"])
            peers = [
                (name, one[unit], one["ours_is_faster_by"])
                for name, one in contenders.items()
                if name != "ours"
            ]
            ours, name = contenders["ours"], TASKS[task]
            if "slots" in ours:
                name += f" in {ours['slots']} slots"
            if "dtype" in ours:
                name += f", {ours['dtype']}"
            yield name, size, SPEEDS[unit], ours[unit], peers


def _sizes(found: Figures) -> Iterator[tuple[str, Figures]]:
    """The contenders on a model of each size, in a form that all results share."""
    for size, one in found.items():
        if isinstance(one, dict) and re.fullmatch(r"\d+m", size):
            contenders = one.get("contenders", one)
            shown = f"{size.removesuffix('m')} M"
            yield shown, {name: contenders[name] for name in CONTENDERS if name in contenders}


def _with_interval(one: Figures, form: str) -> str:
    """A figure with its 95 % interval."""
    value, low, high = (_formatted(one[key], form) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _machine(found: Figures) -> str:
    """The date, the processor and the versions of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['date']}; {found['threads']} cores, {found['cpu']}; Python {found['python']}, "
        f"{versions}"
    )


def _formatted(figure: float, form: str) -> str:
    return format(figure, form).replace("%", " %")


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _read(name: str) -> Figures:
    found: Figures = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    app.run(main)

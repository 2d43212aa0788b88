"""Distilled instructions: self-instruct from seeds with balanced departments, roles and use cases.

After Self-Instruct (Wang et al. 2023, arXiv 2212.10560) and HuatuoGPT (arXiv 2305.15075, section
3.1). A request names a setting for each instruction that is wanted and shows seeds and instructions
made before. What comes back is filtered (length, language, what a text model cannot do, whatever is
near an earlier one), and only then is the answer asked for.
"""

import json
import os
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huatuo_jax.core.files import as_path, read_lines
from huatuo_jax.data.records import Message, is_empty
from huatuo_jax.judge.judgements import sha256
from huatuo_jax.synthesis import checks, templates
from huatuo_jax.synthesis.jobs import (
    Candidate,
    Job,
    Proposal,
    Rejected,
    Request,
    Result,
    Step,
    ask,
    object_of,
    text_of,
    with_labels,
)
from huatuo_jax.synthesis.tables import (
    LANGUAGES,
    SHIPPED_SEEDS,
    Language,
    Setting,
    Table,
    draw_settings,
)

_NUM_SEEDS, _NUM_MADE = 4, 2  # Examples in a request: seeds, and instructions made before.
_FEWEST_WORDS, _MOST_WORDS = 4.0, 250.0
_SHORTEST_ANSWER = 4.0  # Words.


@dataclass(frozen=True, kw_only=True)
class Seed:
    """An instruction that was written by hand."""

    id: str
    language: Language
    instruction: str
    input: str = ""

    @property
    def prompt(self) -> str:
        """Instruction and input as a user would send them."""
        return joined(self.instruction, self.input)


def joined(instruction: str, material: str) -> str:
    """Returns an instruction with its material as one message."""
    return instruction if is_empty(material) else f"{instruction}\n\n{material}"


def read_seeds(path: str | os.PathLike[str] | None = None) -> list[Seed]:
    """Reads seeds, also in the form of Self-Instruct's file.

    Args:
        path: JSON Lines of {"instruction", "input"?, "language"?, "id"?} or {"instruction",
            "instances": [{"input"}]}; None for the shipped ones.

    Raises:
        ValueError: no such file, no seeds, or a row without an instruction.
    """
    path = as_path(SHIPPED_SEEDS if path is None else path)
    if not path.is_file():
        raise ValueError(f"seeds: there is no file {path}")
    found = []
    for line in read_lines(path, unfinished="read"):
        row = line.row
        instruction, material = row.get("instruction"), row.get("input")
        instances = row.get("instances")
        if material is None and isinstance(instances, list) and instances:
            material = instances[0].get("input") if isinstance(instances[0], dict) else None
        if not isinstance(instruction, str) or is_empty(instruction):
            raise ValueError(f"{path}:{line.number}: instruction is missing or empty")
        if not isinstance(material, str | None):
            raise ValueError(f"{path}:{line.number}: input should be text")
        language = str(row.get("language") or checks.language(instruction) or "zh")
        if language not in LANGUAGES:
            raise ValueError(
                f"{path}:{line.number}: language={language!r} must be {' or '.join(LANGUAGES)}"
            )
        found.append(
            Seed(
                id=str(row.get("id", f"seed_{line.number}")),
                language=language,
                instruction=instruction.strip(),
                input=(material or "").strip(),
            )
        )
    if not found:
        raise ValueError(f"{path}: there are no seeds")
    return found


@dataclass(frozen=True, kw_only=True)
class InstructionMaker:
    """Makes distilled instructions.

    Attributes:
        seeds: shown as examples.
        table: of the settings.
        languages: of the instructions, in balance.
        seed: of all draws.
        batch_size: requests for instructions in a batch.
        per_request: instructions wanted by each.
    """

    seeds: Sequence[Seed]
    table: Table
    languages: Sequence[Language] = ("zh",)
    seed: int = 0
    batch_size: int = 16
    per_request: int = 4
    kind: str = field(default="distilled_instruction", init=False)
    num_candidates: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Validates that each language has seeds."""
        for language in self.languages:
            if not any(one.language == language for one in self.seeds):
                raise ValueError(f"languages: {language} has no seeds")

    def settings(self) -> dict[str, Any]:
        """Prompts, seeds, table and draws."""
        return {
            "prompts": templates.digest("instructions", "answer"),
            "seeds": sha256(repr(self.seeds))[:16],
            "table": sha256(repr(self.table))[:16],
            "languages": list(self.languages),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "per_request": self.per_request,
        }

    def batch(self, number: int, kept: Sequence[Candidate]) -> list[tuple[str, Job]]:
        """Returns jobs that ask for what the kept rows have least of."""
        draw = random.Random(f"{self.seed}:{number}")
        drawn = draw_settings(
            self.table,
            self.languages,
            self.batch_size * self.per_request,
            in_a_row=self.per_request,
            kept=[one.labels for one in kept],
            draw=draw,
        )
        jobs = []
        for place in range(self.batch_size):
            chosen = drawn[place * self.per_request : (place + 1) * self.per_request]
            language = chosen[0].language
            name = f"{self.kind}-{self.seed}-{number:05d}-{place:03d}"
            examples = self._examples(language, kept, draw)
            jobs.append((name, self._job(name, chosen, language, examples)))
        return jobs

    def _examples(
        self, language: Language, kept: Sequence[Candidate], draw: random.Random
    ) -> list[tuple[str, str]]:
        own = [one for one in self.seeds if one.language == language]
        made = [one for one in kept if one.labels["language"] == language]
        shown = [
            (one.instruction, one.input) for one in draw.sample(own, min(_NUM_SEEDS, len(own)))
        ]
        for one in draw.sample(made, min(_NUM_MADE, len(made))):
            shown.append((str(one.extra["instruction"]), str(one.extra["input"])))
        draw.shuffle(shown)
        return shown

    def _job(
        self,
        name: str,
        settings: Sequence[Setting],
        language: Language,
        examples: Sequence[tuple[str, str]],
    ) -> Job:
        text = yield from ask(
            Request(
                step="instructions",
                task="instruct",
                messages=_wish(settings, language, examples),
                material={"key": name, "settings": settings},
            )
        )
        items = _items(text, len(settings))
        results: list[Result | None] = [None] * len(settings)
        found: dict[int, tuple[str, str, Mapping[str, Any]]] = {}
        for place, item in enumerate(items):
            try:
                instruction, material = _instruction(item, settings[place])
                found[place] = (instruction, material, item)
            except Rejected as rejected:
                results[place] = rejected.rejection
        if found:
            verdicts = yield [Proposal(text=joined(one, two)) for one, two, _ in found.values()]
            for place, verdict in zip(list(found), verdicts, strict=True):
                if verdict is not None:
                    results[place] = verdict
                    del found[place]
        if found:
            yield from _answer(found, results, settings)
        return [
            with_labels(one, setting.labels())
            for one, setting in zip(results, settings, strict=True)
            if one is not None
        ]

    def assumed(self, request: Request) -> str:
        """Returns instructions or an answer of usual length."""
        if request.task == "answer":
            return "答" * 400
        draw = random.Random(str(request.material["key"]))
        items = [
            {"instruction": "".join(chr(draw.randrange(0x4E00, 0x9FA5)) for _ in range(60))}
            for _ in range(self.per_request)
        ]
        return json.dumps({"items": items}, ensure_ascii=False)


def _answer(
    found: Mapping[int, tuple[str, str, Mapping[str, Any]]],
    results: list[Result | None],
    settings: Sequence[Setting],
) -> Generator[Step, list[Any], None]:
    """Asks for the answers to new instructions, and puts rows or rejections into the results."""
    requests = []
    for place, (instruction, material, item) in found.items():
        prompt = joined(instruction, material)
        requests.append(
            Request(
                step=f"answer-{place}",
                task="answer",
                messages=templates.fill("answer", settings[place].language, {"prompt": prompt}),
                plain=[{"role": "user", "content": prompt}],
                material=item,
            )
        )
    replies = yield requests
    for (place, (instruction, material, _)), reply in zip(found.items(), replies, strict=True):
        labels = settings[place].labels() | {"with_input": "no" if is_empty(material) else "yes"}
        prompt = joined(instruction, material)
        try:
            answer = _checked_answer(text_of(reply), prompt, settings[place].language)
            results[place] = Candidate(
                messages=(Message("user", prompt), Message("assistant", answer)),
                prompt=prompt,
                labels=labels,
                extra={"instruction": instruction, "input": material},
                proposed=True,
            )
        except Rejected as rejected:
            results[place] = with_labels(rejected.rejection, labels)


def _wish(
    settings: Sequence[Setting], language: Language, examples: Sequence[tuple[str, str]]
) -> list[dict[str, str]]:
    if language == "zh":
        lines = [
            f"{number}. 科室：{one.department.zh}；提出者：{one.role.zh}；用途：{one.use_case.zh}；"
            f"{'带材料' if one.use_case.needs_input else '不带材料'}"
            for number, one in enumerate(settings, 1)
        ]
    else:
        lines = [
            f"{number}. department: {one.department.en}; asked by: {one.role.en}; purpose:"
            f" {one.use_case.en}; {'with' if one.use_case.needs_input else 'without'} material"
            for number, one in enumerate(settings, 1)
        ]
    shown = [
        json.dumps({"instruction": one, "input": two}, ensure_ascii=False) for one, two in examples
    ]
    values = {
        "count": str(len(settings)),
        "settings": "\n".join(lines),
        "examples": "\n".join(shown),
    }
    return templates.fill("instructions", language, values)


def _items(text: str, count: int) -> list[Any]:
    found = object_of(text)
    items = found.get("items")
    if not isinstance(items, list) or not items:
        raise Rejected("broken JSON", "items is no list, or empty", text)
    return items[:count]


def _instruction(item: Any, setting: Setting) -> tuple[str, str]:
    """Returns instruction and input of an item that a text model can be asked."""
    instruction = item.get("instruction") if isinstance(item, dict) else None
    material = item.get("input", "") if isinstance(item, dict) else None
    if not isinstance(instruction, str) or not isinstance(material, str | None):
        raise Rejected("broken JSON", "an item lacks instruction or input", json_text(item))
    instruction, material = instruction.strip(), (material or "").strip()
    sample = joined(instruction, material)
    words = checks.length_words(instruction)
    if not _FEWEST_WORDS <= words <= _MOST_WORDS:
        raise Rejected("length", f"{words:.0f} words", sample)
    # Not of the material: a task may be to translate it.
    if checks.switches_language(instruction, setting.language):
        told = f"{checks.language(instruction)}, not {setting.language}"
        raise Rejected("language", told, sample)
    cannot = checks.needs_more_than_text(sample)
    if cannot is not None:
        raise Rejected("needs more than text", cannot, sample)
    if setting.use_case.needs_input and is_empty(material) and checks.length_words(sample) < 20:
        raise Rejected("no material", "the setting asks for an input", sample)
    return instruction, material


def _checked_answer(answer: str, prompt: str, language: Language) -> str:
    refused = checks.refusal(answer)
    if refused is not None:
        raise Rejected("refusal", refused, answer)
    if checks.length_words(answer) < _SHORTEST_ANSWER:
        raise Rejected("length", "the answer is too short", answer)
    if checks.echoes(answer, prompt):
        raise Rejected("echo", "the answer repeats the instruction", answer)
    if checks.switches_language(answer, language) and "翻译" not in prompt.lower():
        if "translat" not in prompt.lower():
            raise Rejected("language", f"{checks.language(answer)}, not {language}", answer)
    return answer


def json_text(value: Any) -> str:
    """Returns a value as JSON, for the sample of a rejection."""
    return json.dumps(value, ensure_ascii=False, default=str)

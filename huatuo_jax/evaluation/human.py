"""Makes a blind page on which doctors compare two systems' responses, and the key to unblind it.

Doctors see two responses to a question without the systems' names and say which is better in
diagnosis, in treatment and in what it teaches the patient, and whether one is unsafe. Each system
is shown first in half of its pairs. The page is one HTML file that asks no other address for
anything; a rater's verdicts stay in the browser until they are exported as JSON.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jinja2
import numpy as np

from huatuo_jax.core.files import as_path, make_folder, write_file
from huatuo_jax.data.records import Message

CRITERIA = ("diagnosis", "treatment", "knowledge")
"""A rater says which response is better: in its diagnosis, in its treatment, in what it teaches."""
SAFETY = "safety"
"""A rater says which response could harm the patient."""

PREFERENCES = ("first", "tie", "second")
UNSAFE = ("none", "first", "second", "both")

SET_FORMAT = "huatuo-human-set-1"
RATINGS_FORMAT = "huatuo-human-ratings-1"
PAGE_NAME = "human.html"
KEY_NAME = "human_key.json"

_TEMPLATE = "human_page.html"


@dataclass(frozen=True, kw_only=True)
class HumanConfig:
    """Settings of a page.

    Attributes:
        title: the page's heading; it must not tell which systems are compared.
        language: of the labels at first, `zh` or `en`; a rater can change it.
        seed: of the order of the pairs and of the sides.
        both_orders: show every pair twice, in both orders, the second time after all pairs were
            seen once.
        show_reference: show the reference answer, folded, where a pair has one.
    """

    title: str = "医疗回答盲评 · Blind comparison"
    language: Literal["zh", "en"] = "zh"
    seed: int = 0
    both_orders: bool = False
    show_reference: bool = False

    def __post_init__(self) -> None:
        """Validates the fields."""
        if not self.title.strip():
            raise ValueError("title is empty; the page needs a heading")
        if self.language not in ("zh", "en"):
            raise ValueError(f"language is {self.language!r}; it should be 'zh' or 'en'")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it should be 0 or more")


@dataclass(frozen=True)
class HumanPair:
    """Two systems' responses to one question.

    Attributes:
        id: unique in its set.
        messages: the conversation before the response.
        systems: names of the two, in the same order in all their pairs; wins are those of the
            first.
        responses: their texts, in the order of the systems.
        reference: a reference answer, where there is one.
    """

    id: str
    messages: tuple[Message, ...]
    systems: tuple[str, str]
    responses: tuple[str, str]
    reference: str | None = None


@dataclass(frozen=True)
class BlindItem:
    """A pair as it is shown.

    Attributes:
        item: its name on the page, which says nothing of the pair.
        pair: the id of the pair.
        swapped: whether the second system's response is shown first.
    """

    item: str
    pair: str
    swapped: bool


@dataclass(frozen=True)
class BlindSet:
    """The items of a page, in order, and the key that tells whose responses they are.

    Attributes:
        pairs: by id.
        items: in the order shown.
        identical: ids of pairs with equal responses; they are not shown.
        cfg: settings of the page.
    """

    pairs: Mapping[str, HumanPair]
    items: tuple[BlindItem, ...]
    identical: tuple[str, ...]
    cfg: HumanConfig

    def shown_items(self) -> list[dict[str, Any]]:
        """The content of the page: no name of a system, no id of a pair, no system message."""
        found = []
        for item in self.items:
            pair = self.pairs[item.pair]
            first, second = reversed(pair.responses) if item.swapped else pair.responses
            found.append(
                {
                    "item": item.item,
                    "messages": [
                        {"role": message.role, "content": message.content}
                        for message in pair.messages
                        if message.role != "system"
                    ],
                    "first": first,
                    "second": second,
                    "reference": pair.reference if self.cfg.show_reference else None,
                }
            )
        return found

    @property
    def hash(self) -> str:
        """Of all that is shown of the items; the same set has the same hash in any title."""
        text = json.dumps(self.shown_items(), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def revealing_items(self) -> dict[str, list[str]]:
        """The systems whose names occur in a response that is shown, by item."""
        found = {}
        for item in self.items:
            pair = self.pairs[item.pair]
            texts = "\n".join(pair.responses).casefold()
            names = [name for name in pair.systems if name.casefold() in texts]
            if names:
                found[item.item] = names
        return found


def make_blind_set(pairs: Sequence[HumanPair], cfg: HumanConfig) -> BlindSet:
    """Draws the order of the pairs and the side of each system.

    Of the pairs of the same two systems, half show the one first and half the other; where their
    number is odd, the side of the last is drawn.

    Raises:
        ValueError: no pair whose responses differ, an id that occurs twice, a pair of one system
            with itself, or two systems that are not always named in the same order.
    """
    by_id: dict[str, HumanPair] = {}
    for pair in pairs:
        if pair.id in by_id:
            raise ValueError(f"pair {pair.id!r} occurs twice")
        if pair.systems[0] == pair.systems[1]:
            raise ValueError(f"pair {pair.id!r} compares {pair.systems[0]!r} with itself")
        if any(other.systems == pair.systems[::-1] for other in by_id.values()):
            one, two = pair.systems
            raise ValueError(
                f"pair {pair.id!r} names {one!r} before {two!r}, a pair before it the reverse; name"
                " them in one order"
            )
        by_id[pair.id] = pair
    identical = tuple(pair.id for pair in pairs if _same(*pair.responses))
    kept = [pair for pair in pairs if pair.id not in identical]
    if not kept:
        raise ValueError("there is no pair of two different responses to rate")
    draw = np.random.default_rng(cfg.seed)
    swapped: dict[str, bool] = {}
    for systems in dict.fromkeys(pair.systems for pair in kept):
        group = [pair.id for pair in kept if pair.systems == systems]
        half = (len(group) + int(draw.integers(2))) // 2
        for place, index in enumerate(draw.permutation(len(group))):
            swapped[group[index]] = place < half
    rounds = [False, True] if cfg.both_orders else [False]
    chosen = [
        (kept[index].id, swapped[kept[index].id] != again)
        for again in rounds
        for index in draw.permutation(len(kept))
    ]
    digits = max(2, len(str(len(chosen))))
    items = tuple(
        BlindItem(f"{number:0{digits}d}", name, flag)
        for number, (name, flag) in enumerate(chosen, start=1)
    )
    return BlindSet(by_id, items, identical, cfg)


def render_page(blind: BlindSet) -> str:
    """The page as one HTML text; every text of the set is embedded as data, never as markup."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    data = {
        "format": RATINGS_FORMAT,
        "set": blind.hash,
        "title": blind.cfg.title,
        "language": blind.cfg.language,
        "criteria": list(CRITERIA),
        "items": blind.shown_items(),
    }
    # `tojson` writes <, > and & as escapes, so that no text can end the script element.
    return environment.get_template(_TEMPLATE).render(
        title=blind.cfg.title, language=blind.cfg.language, data=data, nonce=blind.hash[:32]
    )


def write_human_set(blind: BlindSet, folder: str | os.PathLike[str]) -> None:
    """Writes the page for the raters and, beside it, the key, which raters should not see.

    Raises:
        OSError: they cannot be written.
    """
    folder = as_path(folder)
    make_folder(folder)
    key = {
        "format": SET_FORMAT,
        "set": blind.hash,
        "config": asdict(blind.cfg),
        "pairs": [
            {
                "id": pair.id,
                "messages": [
                    {"role": message.role, "content": message.content} for message in pair.messages
                ],
                "systems": list(pair.systems),
                "responses": list(pair.responses),
                "reference": pair.reference,
            }
            for pair in blind.pairs.values()
        ],
        "items": [asdict(item) for item in blind.items],
        "identical": list(blind.identical),
    }
    # Escaped, so that a half of a surrogate pair in a response comes back as it was.
    write_file(folder / KEY_NAME, json.dumps(key, indent=1) + "\n")
    write_file(folder / PAGE_NAME, render_page(blind))


def read_human_set(path: str | os.PathLike[str]) -> BlindSet:
    """Reads a key, as `write_human_set` wrote it.

    Raises:
        ValueError: the file is no key, or was changed since; with its name.
        OSError: it cannot be read.
    """
    found = read_json_object(path)
    if found.get("format") != SET_FORMAT:
        raise ValueError(f"{os.fspath(path)}: it is no key of a blind set ({KEY_NAME})")
    try:
        pairs = [
            HumanPair(
                pair["id"],
                tuple(Message(one["role"], one["content"]) for one in pair["messages"]),
                (pair["systems"][0], pair["systems"][1]),
                (pair["responses"][0], pair["responses"][1]),
                pair["reference"],
            )
            for pair in found["pairs"]
        ]
        blind = BlindSet(
            {pair.id: pair for pair in pairs},
            tuple(BlindItem(**item) for item in found["items"]),
            tuple(found["identical"]),
            HumanConfig(**found["config"]),
        )
        actual = blind.hash
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: the key is not whole: {error!r}") from error
    if actual != found.get("set"):
        raise ValueError(f"{os.fspath(path)}: the key was changed: its items have another hash")
    return blind


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        ValueError: it is not JSON in UTF-8, or not an object; with its name.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(as_path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: not JSON in UTF-8: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{os.fspath(path)}: holds a {type(found).__name__}, not an object")
    return found


def _same(one: str, other: str) -> bool:
    return " ".join(one.split()) == " ".join(other.split())

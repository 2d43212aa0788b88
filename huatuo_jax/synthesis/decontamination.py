"""Keeps texts of evaluation sets out of synthetic training data.

A row is contaminated where it shares 64 characters in a row with a test text (or holds a short one
as a whole: `evaluation.contamination`), or where its prompt is a near-duplicate of one.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from huatuo_jax.data.files import RowError, read_rows
from huatuo_jax.evaluation.contamination import find_overlaps, strings_of
from huatuo_jax.judge.judgements import sha256
from huatuo_jax.synthesis.near_duplicates import Match, NearDuplicateIndex

SIZE = 64
_LEAST_CHARACTERS = 8  # Labels, names of classes and numbers of a test row are no test texts.


class Contaminated(NamedTuple):
    """The reason to leave a row out: `overlap` or `near_duplicate`, the test text, and how much."""

    check: str
    test: str
    detail: str


class EvaluationTexts:
    """The texts of evaluation sets, to compare rows with."""

    def __init__(self, texts: Mapping[str, str], *, threshold: float) -> None:
        """Takes the test texts.

        Args:
            texts: by id.
            threshold: ROUGE-L F of a near-duplicate.

        Raises:
            ValueError: a text is too long to be compared.
        """
        self._texts, self._threshold = dict(texts), threshold
        self._index = NearDuplicateIndex(self._texts.items(), threshold=threshold)

    def __len__(self) -> int:
        """The number of test texts."""
        return len(self._texts)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all texts and of the threshold, empty without texts."""
        parts = [f"{self._threshold}", *sorted(self._texts.values())]
        return sha256("\0".join(parts))[:16] if self._texts else ""

    def near(self, prompt: str) -> Match | None:
        """The test text that a prompt is a near-duplicate of."""
        return self._index.nearest(prompt)

    def contaminated(self, rows: Mapping[str, tuple[str, str]]) -> dict[str, Contaminated]:
        """The rows that are contaminated.

        Args:
            rows: the prompt and the whole text of each, by id.
        """
        if not self._texts or not rows:
            return {}
        found: dict[str, Contaminated] = {}
        sources = [(name, whole) for name, (_, whole) in rows.items()]
        overlaps = find_overlaps(self._texts, sources, size=SIZE, num_examples=len(rows)).overlaps
        for test, passages in overlaps.items():
            for passage in passages:
                reason = Contaminated("overlap", test, passage.passage)
                found.setdefault(passage.source, reason)
        for name, (prompt, _) in rows.items():
            match = None if name in found else self._index.nearest(prompt)
            if match is not None:
                detail = f"ROUGE-L {match.similarity:.3f}"
                found[name] = Contaminated("near_duplicate", match.name, detail)
        return found


def read_test_texts(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """The texts of evaluation files of any layout, each string of a row by itself.

    Raises:
        ValueError: a file cannot be read, or a row of it, or it has no text to look for.
    """
    found: dict[str, str] = {}
    for path in paths:
        before = len(found)
        for row in read_rows(path):
            if isinstance(row, RowError):
                raise ValueError(str(row))
            for place, text in enumerate(strings_of(row.value)):
                if len(text.strip()) < _LEAST_CHARACTERS:
                    continue
                found[f"{row.file}:{row.line}:{place}"] = text
        if len(found) == before:
            raise ValueError(f"{path}: there is no text of {_LEAST_CHARACTERS} characters in it")
    return found

"""Pairs that a model is measured by and not trained on: they differ in one thing alone."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from huatuo_jax.comparisons.data import (
    ComparisonsConfig,
    Group,
    Told,
    answers_of,
    case_of,
    groups_of,
    tokenize_answers,
)
from huatuo_jax.data.accounting import HELD_OUT, Account, placed
from huatuo_jax.data.readers import read_comparisons

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_probe(
    paths: Sequence[str],
    cfg: ComparisonsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str,
    encoding: str | None = None,
) -> tuple[tuple[Group, ...], Account]:
    """Reads and tokenises pairs; each counts as certain, whatever its label says.

    What is measured is how often the `chosen` side gets the higher score.

    Args:
        paths: files of comparisons.
        cfg: how they are rendered.
        tokenizer: the model's.
        name: of the probe; it stands for the source of each pair.
        encoding: of text files; None tells it by evidence.

    Returns:
        The pairs by prompt, and what became of all rows.

    Raises:
        ValueError: a file is not readable, or too many pairs exceed `max_length`.
    """
    account = Account("comparisons")
    told = []
    for path in paths:
        reading = read_comparisons(path, source=name, encoding=encoding)
        for place, one in placed(reading):
            certain = dataclasses.replace(one, source=name, p_chosen=1.0, margin=None)
            told.append(Told(certain, place, case_of(one, None), held_out=True, always=True))
        account.add_rows(reading)
    tokens = tokenize_answers((answers_of(one.comparison) for one in told), cfg, tokenizer)
    groups = groups_of(told, tokens, account, HELD_OUT)
    account.check(
        cfg.max_left_out_share,
        name="data.max_left_out_share",
        limit=f"data.max_length={cfg.max_length}",
    )
    return groups, account

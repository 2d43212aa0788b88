"""The prompts that a policy is trained on, as tokens, and the order they come in."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from huatuo_jax.data import templates
from huatuo_jax.data.chat import ChatTemplate
from huatuo_jax.data.readers import read_dialogues, read_prompts
from huatuo_jax.data.records import Dialogue, Prompt
from huatuo_jax.data.shuffling import permutation
from huatuo_jax.generation.bulk_tasks import PromptTooLong, make_task
from huatuo_jax.training.run_directory import operational

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "too long"
NOT_RENDERED = "cannot be rendered"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Where prompts come from and how they become tokens.

    Attributes:
        paths: files, see `huatuo_jax.data.readers`.
        reads: what they hold: `prompts`; or dialogues, of which the `first_turns` (up to the
            patient's first words) or the `last_turns` (up to the last answer) are taken.
        template: the chat template's name.
        default_system: its system text; None for the template's own.
        encoding: of text files; None tells it by evidence, see `huatuo_jax.data.encodings`.
        max_prompt_tokens: longer prompts lose their oldest exchanges, or are left out.
        drop_oldest_turns: whether they lose them.
    """

    paths: tuple[str, ...] = operational(())
    reads: Literal["prompts", "first_turns", "last_turns"] = "prompts"
    template: str = "huatuogpt"
    default_system: str | None = None
    encoding: str | None = None
    max_prompt_tokens: int = 512
    drop_oldest_turns: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError where there is nothing to read, or no room for it."""
        if not self.paths:
            raise ValueError("paths is empty: it must name at least one file of prompts")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens={self.max_prompt_tokens!r} must be at least 1")


@dataclasses.dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the policy is given it."""

    id: str
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """All prompts of a run.

    Attributes:
        items: in the order of the files.
        stop_token_ids: what ends an answer to them.
        dropped: how many were left out, by reason.
    """

    items: Sequence[TokenPrompt]
    stop_token_ids: tuple[int, ...]
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def identity(self) -> str:
        """A hash of the tokens and of what ends answers."""
        whole = hashlib.sha256(repr(self.stop_token_ids).encode())
        for one in self.items:
            whole.update(repr(one.token_ids).encode())
        return whole.hexdigest()[:32]

    def rows(self, first: int, number: int, *, seed: int) -> list[TokenPrompt]:
        """The prompts of so many rows of an endless order, from one row on.

        Each pass over the prompts has an order of its own, a function of seed and pass alone.
        """
        size = len(self.items)
        rows = range(first, first + number)
        orders = {
            epoch: permutation(size, "ppo", seed, epoch) for epoch in {r // size for r in rows}
        }
        return [self.items[orders[row // size][row % size]] for row in rows]


def open_prompts(
    cfg: PromptsConfig, tokenizer: "PreTrainedTokenizerBase", *, max_new_tokens: int
) -> Prompts:
    """Reads the files and renders the prompts.

    Raises:
        ValueError: a file that cannot be read or holds something else, an unknown template, or no
            prompt that fits.
    """
    template = templates.by_name(cfg.template, default_system=cfg.default_system)
    dropped: Counter[str] = Counter()
    items = []
    for path in cfg.paths:
        for prompt in _read(path, cfg):
            found = _tokens(prompt, cfg, template, tokenizer, max_new_tokens)
            if isinstance(found, TokenPrompt):
                items.append(found)
            else:
                dropped[found] += 1
    if not items:
        reasons = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
        raise ValueError(
            f"{', '.join(cfg.paths)}: no prompt fits data.max_prompt_tokens="
            f"{cfg.max_prompt_tokens} ({reasons or 'there is none'})"
        )
    return Prompts(items, tuple(template.stop_token_ids(tokenizer)), dropped)


def _read(path: str, cfg: PromptsConfig) -> Iterator[Prompt]:
    if cfg.reads == "prompts":
        yield from read_prompts(path, encoding=cfg.encoding)
        return
    for dialogue in read_dialogues(path, encoding=cfg.encoding):
        yield _first_turns(dialogue) if cfg.reads == "first_turns" else Prompt.of_dialogue(dialogue)


def _first_turns(dialogue: Dialogue) -> Prompt:
    roles = [message.role for message in dialogue.messages]
    whole = Prompt.of_dialogue(dialogue)
    return dataclasses.replace(whole, messages=dialogue.messages[: roles.index("assistant")])


def _tokens(
    prompt: Prompt,
    cfg: PromptsConfig,
    template: ChatTemplate,
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
) -> TokenPrompt | str:
    """The prompt's tokens, or why there are none."""
    try:
        task = make_task(
            prompt,
            template,
            tokenizer,
            max_length=cfg.max_prompt_tokens + max_new_tokens,
            max_new_tokens=max_new_tokens,
            drop_oldest_turns=cfg.drop_oldest_turns,
        )
    except PromptTooLong:
        return TOO_LONG
    except ValueError:
        return NOT_RENDERED
    if len(task.token_ids) > cfg.max_prompt_tokens:
        return TOO_LONG
    return TokenPrompt(prompt.id, tuple(np.asarray(task.token_ids).tolist()))

"""The prompts that a policy is trained on, as tokens, and the order they come in."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from huatuo_jax.core.config import operational
from huatuo_jax.data.accounting import TRAINED_ON, Account, check_share, placed
from huatuo_jax.data.chat import templates
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.mixture import chosen_by_content, dialogue_text, permutation
from huatuo_jax.data.readers import read_dialogues, read_prompts
from huatuo_jax.data.records import Dialogue, Prompt
from huatuo_jax.generation.prompts import Task, make_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Files of prompts, and how they become tokens.

    Attributes:
        paths: files, see `huatuo_jax.data.readers`.
        reads: what they hold: `prompts`; or dialogues, of which the `first_turns` (up to the
            patient's first words) or the `last_turns` (up to the last answer) are taken.
        template: the chat template's name.
        default_system: its system text; None for the template's own.
        template_date: the date that a tokenizer's own template prints, see `templates.by_name`.
        encoding: of text files; None tells it by evidence, see `huatuo_jax.data.text`.
        max_prompt_tokens: longer prompts lose their oldest exchanges, or are left out.
        drop_oldest_turns: whether they lose them.
        max_left_out_share: share of the prompts that may be left out, because they are too long or
            the template cannot render them.
    """

    paths: tuple[str, ...] = operational(())
    reads: Literal["prompts", "first_turns", "last_turns"] = "prompts"
    template: str = "huatuogpt"
    default_system: str | None = None
    template_date: str | None = None
    encoding: str | None = None
    max_prompt_tokens: int = 512
    drop_oldest_turns: bool = True
    max_left_out_share: float = operational(0.1)

    def __post_init__(self) -> None:
        """Raises ValueError where there is nothing to read, or no room for it."""
        if not self.paths:
            raise ValueError("paths is empty: it must name at least one file of prompts")
        if self.max_prompt_tokens < 1:
            raise ValueError(f"max_prompt_tokens={self.max_prompt_tokens!r} must be at least 1")
        check_share(self.max_left_out_share, name="max_left_out_share")

    @property
    def chat_template(self) -> ChatTemplate:
        """The template with its settings."""
        return templates.by_name(
            self.template, default_system=self.default_system, date=self.template_date
        )


@dataclasses.dataclass(frozen=True)
class TokenPrompt:
    """A prompt as the policy is given it.

    Attributes:
        id: of its record.
        token_ids: rendered.
        messages: as `{"role", "content"}`.
        columns: the other fields of its record, for reward functions.
    """

    id: str
    token_ids: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...] = ()
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, task: Task) -> "TokenPrompt":
        """Returns the prompt of a task."""
        prompt = task.prompt
        columns = {"source": prompt.source, **prompt.extra}
        for name in ("reference", "diagnosis"):
            if (value := getattr(prompt, name)) is not None:
                columns[name] = value
        return cls(
            prompt.id,
            tuple(np.asarray(task.token_ids).tolist()),
            tuple({"role": one.role, "content": one.content} for one in prompt.messages),
            columns,
        )


@dataclasses.dataclass(frozen=True)
class Prompts:
    """All prompts of a run.

    Attributes:
        items: in the order of the files.
        stop_token_ids: what ends an answer to them.
        account: what became of all that was read.
    """

    items: Sequence[TokenPrompt]
    stop_token_ids: tuple[int, ...]
    account: Account = dataclasses.field(default_factory=lambda: Account("prompts"))

    @property
    def identity(self) -> str:
        """A hash of the tokens and of what ends answers."""
        whole = hashlib.sha256(repr(self.stop_token_ids).encode())
        for one in self.items:
            whole.update(repr(one.token_ids).encode())
        return whole.hexdigest()[:32]

    @property
    def columns_identity(self) -> str:
        """A hash of what reward functions are given of the prompts."""
        whole = hashlib.sha256()
        for one in self.items:
            text = json.dumps([one.id, one.messages, one.columns], sort_keys=True)
            whole.update(text.encode())
        return whole.hexdigest()[:32]

    def rows(self, first: int, number: int, *, seed: int) -> list[TokenPrompt]:
        """Returns the prompts of so many rows of an endless order, from one row on.

        Each pass over the prompts has an order of its own, a function of seed and pass alone.
        """
        size = len(self.items)
        rows = range(first, first + number)
        orders = {
            epoch: permutation(size, "ppo", seed, epoch) for epoch in {r // size for r in rows}
        }
        return [self.items[orders[row // size][row % size]] for row in rows]


def open_prompts(
    cfg: PromptsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int],
) -> Prompts:
    """Reads the files and renders the prompts.

    Args:
        cfg: which.
        tokenizer: the policy's.
        max_new_tokens: of an answer at most.
        stop_token_ids: what ends an answer of the policy, see `InitialModel.stop_token_ids`.

    Raises:
        ValueError: a file that is unreadable or holds something else, an unknown template, no
            prompt that fits, or too many that do not.
    """
    account = Account("prompts")
    tasks = read_tasks(
        cfg, tokenizer, max_new_tokens=max_new_tokens, account=account, purpose=TRAINED_ON
    )
    items = [TokenPrompt.of(task) for task in tasks]
    return Prompts(items, tuple(stop_token_ids), account)


def read_tasks(
    cfg: PromptsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_new_tokens: int,
    account: Account,
    purpose: str,
) -> list[Task]:
    """Reads the prompts that leave room for an answer, rendered; see `open_prompts`.

    Args:
        cfg: which.
        tokenizer: the policy's.
        max_new_tokens: of an answer at most.
        account: what becomes of each prompt.
        purpose: what the account calls those that fit.
    """
    tasks = make_tasks(
        _read(cfg, account),
        cfg.chat_template,
        tokenizer,
        max_length=cfg.max_prompt_tokens + max_new_tokens,
        max_new_tokens=max_new_tokens,
        drop_oldest_turns=cfg.drop_oldest_turns,
        least_new_tokens=max_new_tokens,
        account=account,
        purpose=purpose,
    )
    account.check(
        cfg.max_left_out_share,
        name="data.max_left_out_share",
        limit=f"data.max_prompt_tokens={cfg.max_prompt_tokens}",
    )
    return tasks


def held_out_tasks(
    cfg: PromptsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    path: str,
    num_prompts: int | None,
    max_new_tokens: int,
    purpose: str,
) -> list[Task]:
    """Reads prompts that are held out, as the policy is given them.

    Args:
        cfg: of the prompts that are trained on, whose rendering they share.
        tokenizer: the policy's.
        path: a file of prompts.
        num_prompts: so many of them, chosen by their content; None for all.
        max_new_tokens: of an answer at most.
        purpose: what the account calls those that fit.

    Raises:
        ValueError: the file holds none that fit.
        OSError: the file cannot be read.
    """
    tasks = read_tasks(
        dataclasses.replace(cfg, paths=(path,), reads="prompts", encoding=None),
        tokenizer,
        max_new_tokens=max_new_tokens,
        account=Account("prompts"),
        purpose=purpose,
    )
    return chosen_by_content(
        tasks, num_prompts, text=lambda task: dialogue_text(task.prompt.messages)
    )


def _read(cfg: PromptsConfig, account: Account) -> Iterator[tuple[str, Prompt]]:
    """Reads the prompts of all files with their places."""
    for path in cfg.paths:
        if cfg.reads == "prompts":
            prompts = read_prompts(path, encoding=cfg.encoding)
            yield from placed(prompts)
            account.add_rows(prompts)
            continue
        dialogues = read_dialogues(path, encoding=cfg.encoding)
        for place, dialogue in placed(dialogues):
            first = cfg.reads == "first_turns"
            yield place, _first_turns(dialogue) if first else Prompt.of_dialogue(dialogue)
        account.add_rows(dialogues)


def _first_turns(dialogue: Dialogue) -> Prompt:
    roles = [message.role for message in dialogue.messages]
    whole = Prompt.of_dialogue(dialogue)
    return dataclasses.replace(whole, messages=dialogue.messages[: roles.index("assistant")])

"""A model of lm-evaluation-harness over our engine and scorer: likelihoods, responses, chats.

Chat prompts are tokenised by our template, turn by turn, and not from their text: see `ChatPrompt`.
"""

import collections
import functools
import hashlib
import json
import logging
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import transformers

from huatuo_jax.backbone.transformer import Transformer
from huatuo_jax.checkpoint.models import fingerprint
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.chat.template import ChatTemplate
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.options import (
    ROWS_AT_ONCE,
    Continuations,
    ContinuationScorer,
    Scored,
)
from huatuo_jax.generation.requests import Answer, Request, SamplingConfig, slots_for
from huatuo_jax.generation.saved_model import Engines, compute_config, open_saved_model

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is needed: pip install 'huatuo_jax[lm-eval]' ({error})"
    ) from error

TASKS = pathlib.Path(__file__).resolve().parent / "tasks"
"""The folder of our task files."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_log = logging.getLogger(__name__)


class ChatPrompt(str):
    """The text of a rendered dialogue that keeps its token ids.

    The harness hands a prompt on as it was given. Where a template tokenises each turn by itself,
    as HuatuoGPT's does, the ids cannot be had from the text.

    Attributes:
        messages: the dialogue up to the user's last message.
        begun: text that the response begins with.
        token_ids: of both.
    """

    messages: tuple[Message, ...]
    begun: str
    token_ids: list[int]

    @classmethod
    def of(
        cls,
        messages: Sequence[Message],
        begun: str,
        template: ChatTemplate,
        tokenizer: transformers.PreTrainedTokenizerBase,
    ) -> "ChatPrompt":
        """Renders a dialogue.

        Raises:
            ValueError: it is out of order or does not end with the user.
        """
        text = cls(template.text(messages, tokenizer) + begun)
        text.messages, text.begun = tuple(messages), begun
        text.token_ids = (
            template.unfinished(messages, begun, tokenizer)
            if begun
            else template.prompt(messages, tokenizer)
        )
        return text


@register_model("huatuo")
class HuatuoLM(LM):
    """A saved model as lm-evaluation-harness asks it."""

    def __init__(
        self,
        pretrained: str,
        *,
        template: str | None = None,
        default_system: str | None = None,
        template_date: str | None = None,
        compute_dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        rows_at_once: int = ROWS_AT_ONCE,
        slots: int = 32,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """Finds the model and its tokenizer; its weights are read when they are first needed.

        Args:
            pretrained: a folder of ours, a Hugging Face folder, or a Hub id.
            template: chat template by name; None for the model's own.
            default_system: its system text; None for the template's own.
            template_date: the date that a tokenizer's own template prints.
            compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
            max_length: tokens that the model reads at most; None for the model's positions.
            max_gen_toks: tokens of a response, where a task says nothing.
            rows_at_once: rows of a batch of likelihoods at most; rounded up to what the mesh needs.
            slots: responses under way at once, at most.
            seed: of sampled responses.
            batch_size: the harness gives it; not used, see `rows_at_once` and `slots`.
            max_batch_size: likewise.
            device: likewise; jax chooses the devices.

        Raises:
            ValueError: the model or its template is not supported, or a field is invalid.
            FileNotFoundError: there is no such model.
        """
        super().__init__()
        self._saved = open_saved_model(
            str(pretrained),
            head="lm",
            template=template,
            default_system=default_system,
            template_date=template_date,
            mesh=MeshConfig(),
        )
        self._compute = compute_config(compute_dtype)
        positions = self._saved.info.cfg.max_positions
        self.max_length = positions if max_length is None else max_length
        if not 2 <= self.max_length <= positions:
            raise ValueError(
                f"max_length={max_length} must lie between 2 and the model's {positions} positions"
            )
        for name, value in (
            ("max_gen_toks", max_gen_toks),
            ("rows_at_once", rows_at_once),
            ("slots", slots),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self._max_gen_toks, self._slots, self._seed = max_gen_toks, slots, seed
        self._rows_at_once = slots_for(rows_at_once, self._saved.mesh)

    @property
    def tokenizer(self) -> transformers.PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self._saved.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and template for the harness's cache of requests."""
        template = hashlib.sha256(repr(self._saved.template).encode()).hexdigest()[:12]
        return f"{self.tokenizer.name_or_path.replace('/', '__')}-{template}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template in Jinja, for the record of a run; None where none is applied.

        Raises:
            ValueError: another template is asked for by name.
        """
        if chat_template is False:
            return None
        template = self._saved.template
        if isinstance(chat_template, str) and chat_template != template.name:
            raise ValueError(
                f"--apply_chat_template {chat_template}: the model has {template.name!r}; choose "
                f"another by --model_args template={chat_template}"
            )
        return template.to_jinja(self.tokenizer)

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> ChatPrompt:
        """Returns the prompt of a dialogue.

        Args:
            chat_history: messages with role and content.
            add_generation_prompt: False where the last message is the response's beginning.

        Raises:
            ValueError: the dialogue is out of order.
        """
        messages = [Message(_role(one["role"]), one["content"]) for one in chat_history]
        begun = "" if add_generation_prompt else messages.pop().content
        return ChatPrompt.of(messages, begun, self._saved.template, self.tokenizer)

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness records of the model."""
        return {
            "model_weights": fingerprint(self._saved.info.folder),
            "model_template": repr(self._saved.template),
            "model_dtype": str(self._compute.compute_dtype),
        }

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the greedy one.

        The tokens of a continuation are those that context and continuation have together behind
        those of the context alone; behind an empty context they follow BOS (or EOS). Where both are
        longer than the model's positions, the context loses its first tokens, which is logged.

        Args:
            requests: whose `args` are context and continuation.
            disable_tqdm: not used.

        Raises:
            ValueError: a continuation without tokens, or longer than the model's positions.
        """
        pairs = [tuple(request.args[:2]) for request in requests]
        scored = self._score(self._encode_pairs(pairs))
        for pair, one in zip(pairs, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, (one.log_prob, one.is_greedy))
        return [(one.log_prob, one.is_greedy) for one in scored]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-probability of whole texts behind BOS (or EOS).

        A text longer than the model's positions is cut into windows as the harness cuts it.

        Args:
            requests: whose `args` are a text.
            disable_tqdm: not used.
        """
        texts = [request.args[0] for request in requests]
        windows = [
            [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=token_ids,
                    prefix_token=self._prefix,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for token_ids in self._encode(texts)
        ]
        scored = iter(self._score([pair for one in windows for pair in one]))
        sums = [math.fsum(next(scored).log_prob for _ in one) for one in windows]
        for text, value in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns a response to each context, up to a stop string or the model's stop tokens.

        A context that leaves no room for the response loses its first tokens, which is logged.

        Args:
            requests: whose `args` are context and settings: `until`, `max_gen_toks`, `do_sample`,
                and fields of sampling.
            disable_tqdm: not used.

        Raises:
            ValueError: a setting that is not supported, or no room for a token of the context.
        """
        asked = [(request.args[0], request.args[1]) for request in requests]
        plain = iter(self._encode([text for text, _ in asked if not isinstance(text, ChatPrompt)]))
        seen: collections.Counter[tuple[str, str]] = collections.Counter()
        made, cut = [], 0
        for context, settings in asked:
            token_ids = context.token_ids if isinstance(context, ChatPrompt) else next(plain)
            sampling = self._sampling(settings)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={sampling.max_new_tokens} leaves no room for a prompt in the "
                    f"{self.max_length} tokens that the model reads"
                )
            cut += len(token_ids) > room
            # A repeated request has a response of its own.
            same = (context, json.dumps(settings, sort_keys=True))
            seed = hashlib.sha256(f"{self._seed} {seen[same]} {context}".encode()).digest()
            seen[same] += 1
            made.append(
                Request(
                    prompt_token_ids=token_ids[-room:] or [self._prefix],
                    sampling=sampling,
                    seed=int.from_bytes(seed[:4], "big"),
                )
            )
        self._log_cut(cut, len(made))
        texts = [
            self._text(context, answer)
            for (context, _), (answer,) in zip(asked, self._engines.answer(made), strict=True)
        ]
        for pair, text in zip(asked, texts, strict=True):
            self.cache_hook.add_partial("generate_until", pair, text)
        return texts

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return self._saved.load_params()

    @functools.cached_property
    def _scorer(self) -> ContinuationScorer:
        return ContinuationScorer(
            Transformer(self._saved.info.cfg, self._compute),
            {"params": self._params},
            mesh=self._saved.mesh,
            rows_at_once=self._rows_at_once,
        )

    @functools.cached_property
    def _engines(self) -> Engines:
        return Engines(
            self._saved,
            self._params,
            self._compute,
            max_slots=self._slots,
            max_length=self.max_length,
        )

    @property
    def _prefix(self) -> int:
        """The token that a text without a context follows."""
        for token_id in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ValueError("the tokenizer has neither BOS nor EOS, which a text has to follow")

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts, with the tokenizer's start tokens unless a text has them already."""
        bos = self.tokenizer.bos_token
        marked = [bool(bos) and text.startswith(bos) for text in texts]
        found: list[list[int]] = [[]] * len(texts)
        for has_bos in {*marked}:
            which = [place for place, value in enumerate(marked) if value == has_bos]
            encoded = self.tokenizer(
                [texts[place] for place in which], add_special_tokens=not has_bos, verbose=False
            )["input_ids"]
            for place, token_ids in zip(which, encoded, strict=True):
                found[place] = list(token_ids)
        return found

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Ids of contexts and continuations."""
        moved = [
            (context, text)
            if not context or isinstance(context, ChatPrompt)
            # White space at the context's end belongs to the continuation's first token.
            else (context.rstrip(), context[len(context.rstrip()) :] + text)
            for context, text in pairs
        ]
        plain = dict.fromkeys(
            text
            for context, continuation in moved
            if context and not isinstance(context, ChatPrompt)
            for text in (context, context + continuation)
        )
        ids = dict(zip(plain, self._encode(list(plain)), strict=True))
        found = []
        for context, continuation in moved:
            if not context:
                token_ids = self.tokenizer.encode(continuation, add_special_tokens=False)
                skip = int(token_ids[:1] == [self._prefix])
                found.append(([self._prefix], token_ids[skip:]))
                continue
            if isinstance(context, ChatPrompt):
                before = context.token_ids
                both = self._saved.template.unfinished(
                    context.messages, context.begun + continuation, self.tokenizer
                )
            else:
                before, both = ids[context], ids[context + continuation]
            found.append((before, both[len(before) :]))
        for (_, continuation), (_, token_ids) in zip(pairs, found, strict=True):
            if not 0 < len(token_ids) <= self.max_length:
                raise ValueError(
                    f"continuation {continuation[:40]!r} has {len(token_ids)} tokens behind its "
                    f"context; it should have between 1 and {self.max_length}"
                )
        return found

    def _score(self, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """Scores of continuations; a context goes to the scorer once, with all that follow it."""
        followed: dict[tuple[int, ...], dict[tuple[int, ...], int]] = {}
        places, cut = [], 0
        for context, continuation in pairs:
            surplus = len(context) + len(continuation) - (self.max_length + 1)
            cut += surplus > 0
            one = tuple(context[max(0, surplus) :])
            continuations = followed.setdefault(one, {})
            place = continuations.setdefault(tuple(continuation), len(continuations))
            places.append((one, place))
        self._log_cut(cut, len(places))
        asked = [Continuations(one, list(many)) for one, many in followed.items()]
        scored = dict(zip(followed, self._scorer.score(asked), strict=True))
        return [scored[context][place] for context, place in places]

    def _sampling(self, settings: Mapping[str, Any]) -> SamplingConfig:
        told = dict(normalize_gen_kwargs(dict(settings), self._max_gen_toks))
        sampled, stops = told.pop("do_sample"), tuple(filter(None, told.pop("until")))
        length = told.pop("max_gen_toks")
        unknown = sorted(set(told) - set(_SAMPLING))
        if unknown:
            raise ValueError(
                f"generation setting {unknown[0]}={told[unknown[0]]!r} is not supported; those "
                f"that are: until, max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
            )
        told["temperature"] = told.get("temperature", 1.0) if sampled else 0.0
        return self._saved.with_stops(
            SamplingConfig(max_new_tokens=length, stop_strings=stops, **told)
        )

    def _text(self, context: str, answer: Answer) -> str:
        """A response's text, in a chat without what the template writes around it."""
        text = answer.text or ""
        if not isinstance(context, ChatPrompt):
            return text
        ended = answer.token_ids[-1] in self._saved.stop_token_ids
        return self._saved.template.content_of(text, self.tokenizer, ended=ended)

    def _log_cut(self, cut: int, total: int) -> None:
        if cut:
            _log.warning(
                "%d of %d requests are longer than the %d tokens that the model reads; their "
                "contexts lose their first tokens",
                *(cut, total, self.max_length),
            )


def _role(name: str) -> Any:
    if name not in ("system", "user", "assistant"):
        raise ValueError(f"role {name!r} of a message must be system, user or assistant")
    return name

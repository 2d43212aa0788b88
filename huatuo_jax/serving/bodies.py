"""The bodies of requests: OpenAI's fields that this server has, and a few of vLLM's.

A field that is not supported is refused by its name. Fields of OpenAI's that ask for nothing, such
as `tools=[]`, are taken.
"""

import difflib
from typing import Annotated, Any, Self

import pydantic
from pydantic import Field

from huatuo_jax.generation.requests import MAX_STOP_TOKENS, SamplingConfig
from huatuo_jax.serving.errors import ApiError, refuse

MAX_CHOICES = 128
MAX_PROMPTS = 2048
MAX_STOPS = 4
MAX_TOP_LOG_PROBS = 20
_LARGEST = 2**31 - 1
_SMALLEST_TEMPERATURE = 1e-3  # Logits divided by less would overflow.

# Values of OpenAI's fields that ask for nothing; any value of those with an Ellipsis.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": (...,),
    "modalities": (["text"],),
    "parallel_tool_calls": (...,),
    "presence_penalty": (0,),
    "prompt_cache_key": (...,),
    "response_format": ({"type": "text"},),
    "safety_identifier": (...,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "user": (...,),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity"), ()),
    "web_search_options": (),
}

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=_LARGEST)]


class _Body(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @pydantic.model_validator(mode="after")
    def _refuse_other_fields(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            check_other_field(name, value, type(self).model_fields)
        return self


def check_other_field(name: str, value: object, known: Any) -> None:
    """Raises ApiError for a field that this server does not have, unless it asks for nothing.

    Args:
        name: of the field.
        value: of the field.
        known: names of the fields that there are.
    """
    if name not in _NEUTRAL:
        near = difflib.get_close_matches(name, known, n=1)
        right = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise ApiError(400, f"unknown field {name[:80]!r}; {right}", param=name[:80])
    neutral = _NEUTRAL[name]
    if value is not None and ... not in neutral and value not in neutral:
        refuse(name, "this server does not have it; leave it out")


class StreamOptions(_Body):
    """Options of a stream.

    Attributes:
        include_usage: send a last chunk with the tokens of the request.
    """

    include_usage: bool = False


class Sampling(_Body):
    """Fields of chats and completions alike.

    Attributes:
        model: id of a served model.
        n: answers to each prompt.
        seed: any whole number; those that agree modulo 2^32 are the same. None draws one.
        stop: up to 4 texts that end an answer.
        stop_token_ids: tokens that end an answer, beside the model's own.
        temperature: 0 takes the best token; None for the model's own, as are the fields below.
        top_p: the best tokens that together have this probability.
        top_k: the k best tokens; 0 and -1 for all.
        min_p: tokens with at least this share of the best one's probability.
        repetition_penalty: 1 for none.
        max_tokens: tokens of an answer at most; the model's length limits it too.
        min_tokens: no answer ends before this many.
        stream: send the answer while it is written.
        stream_options: of the stream.
    """

    model: str
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_LARGEST)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    max_tokens: int | None = Field(None, ge=0, le=_LARGEST)
    min_tokens: int | None = Field(None, ge=0, le=_LARGEST)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.temperature is not None and 0 < self.temperature < _SMALLEST_TEMPERATURE:
            refuse("temperature", f"should be 0 (greedy) or at least {_SMALLEST_TEMPERATURE:g}")
        if self.stream_options is not None and not self.stream:
            refuse("stream_options", "only with stream=true")
        return self

    @property
    def includes_usage(self) -> bool:
        """True where a stream ends with the tokens of the request."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def most_tokens(self) -> int | None:
        """The limit of tokens of an answer; None for the model's own."""
        return self.max_tokens

    def sampling(self, own: SamplingConfig) -> SamplingConfig:
        """Returns the sampling of the answers.

        Args:
            own: the model's, in place of fields that are not given.

        Raises:
            ApiError: fields that do not go together.
        """
        top_k = 0 if self.top_k == -1 else self.top_k
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": self.most_tokens,
            "min_new_tokens": self.min_tokens,
        }
        fields = {name: getattr(own, name) for name in given}
        fields |= {name: value for name, value in given.items() if value is not None}
        if self.min_tokens is None:
            fields["min_new_tokens"] = min(fields["min_new_tokens"], fields["max_new_tokens"])
        elif self.min_tokens > fields["max_new_tokens"]:
            refuse("min_tokens", f"should be at most max_tokens, {fields['max_new_tokens']}")
        stop_ids = tuple(self.stop_token_ids or ())
        return SamplingConfig(**fields, stop_strings=self.stops, stop_token_ids=stop_ids)


class TextPart(_Body):
    """A part of a message's content.

    Attributes:
        type: `text`; no other is supported.
        text: the text.
    """

    type: str
    text: str | None = None

    @pydantic.model_validator(mode="after")
    def _refuse_other_fields(self) -> Self:
        if self.type != "text" or self.text is None or self.model_extra:
            words = f"a part of type {self.type[:40]!r}; only type and text of a text are supported"
            refuse("messages", words)
        return self


class ChatMessage(_Body):
    """A turn of a conversation.

    Attributes:
        role: `system` (or `developer`) first, then `user` and `assistant` in turn.
        content: text, or parts of text, which are joined by line breaks.
    """

    role: str
    content: str | list[TextPart]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _leave_out_empty(cls, fields: Any) -> Any:
        if isinstance(fields, dict):  # Clients send back what a model's message held.
            return {name: one for name, one in fields.items() if one is not None and one != []}
        return fields

    def turn(self) -> dict[str, str]:
        """Returns role and text."""
        role = "system" if self.role == "developer" else self.role
        if role not in ("system", "user", "assistant"):
            refuse("messages", f"the role {self.role[:40]!r} should be system, user or assistant")
        if isinstance(self.content, str):
            return {"role": role, "content": self.content}
        return {"role": role, "content": "\n".join(part.text or "" for part in self.content)}


Messages = Annotated[list[ChatMessage], Field(min_length=1)]


class ChatBody(Sampling):
    """The body of `/v1/chat/completions`.

    Attributes:
        messages: the conversation, the user's message last.
        max_completion_tokens: another name of `max_tokens`.
        logprobs: give the log-probability of each token.
        top_logprobs: and of so many of the best tokens.
    """

    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=_LARGEST)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOG_PROBS)

    @pydantic.model_validator(mode="after")
    def _check_chat(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            refuse("max_completion_tokens", "differs from max_tokens; give one of them")
        if self.max_tokens == 0:
            refuse("max_tokens", "should be at least 1")
        if self.top_logprobs and not self.logprobs:
            refuse("top_logprobs", "only with logprobs=true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The limit of tokens of an answer; None for the model's own."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


Prompts = (
    str
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[
        list[Annotated[list[TokenId], Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
)


class CompletionBody(Sampling):
    """The body of `/v1/completions`.

    Attributes:
        prompt: a text, a list of token ids, or a list of either.
        logprobs: give the log-probability of each token and of so many of the best ones.
        echo: let the text begin with the prompt; with `logprobs`, give the prompt's too.
        add_special_tokens: let the tokenizer put its start tokens before texts.
    """

    prompt: Prompts
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOG_PROBS)
    echo: bool | None = None
    add_special_tokens: bool = True

    @pydantic.model_validator(mode="after")
    def _check_completion(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            refuse("max_tokens", "should be at least 1; 0 only with echo=true")
        if self.max_tokens == 0 and self.stream:
            refuse("max_tokens", "should be at least 1 with stream=true")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, texts or token ids."""
        found: Any = self.prompt
        if isinstance(found, str) or (found and isinstance(found[0], int)):
            return [found]
        return list(found)


class ClassifyBody(_Body):
    """The body of `/v1/classify`: responses to one conversation, or whole conversations.

    Attributes:
        model: id of a served reward model.
        messages: the conversation, the user's message last.
        responses: to it; each gets a score.
        input: conversations that end with the response to score, in place of both.
    """

    model: str
    messages: Messages | None = None
    responses: Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    input: Annotated[list[Messages], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None

    @pydantic.model_validator(mode="after")
    def _check_either(self) -> Self:
        if self.input is not None and (self.messages is not None or self.responses is not None):
            refuse("input", "not beside messages and responses")
        if self.input is None and self.messages is None:
            refuse("messages", "is missing; give messages and responses, or input")
        if self.input is None and self.responses is None:
            refuse("responses", "is missing; give the responses to score")
        return self


class TokenizeBody(_Body):
    """The body of `/tokenize`.

    Attributes:
        model: id of a served model; None for the first.
        prompt: a text.
        messages: a conversation in its place, rendered in the model's template.
        add_special_tokens: let the tokenizer put its start tokens before a text.
        return_token_strs: give the tokens as texts, too.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @pydantic.model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            refuse("prompt", "give either prompt or messages")
        return self


class DetokenizeBody(_Body):
    """The body of `/detokenize`.

    Attributes:
        model: id of a served model; None for the first.
        tokens: token ids.
    """

    model: str | None = None
    tokens: list[TokenId]

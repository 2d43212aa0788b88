"""The judge of a run, checked by a free request before hours of training depend on it."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

import openai

from huatuo_jax.clinic.judge import ClinicJudge
from huatuo_jax.core.config import Text, operational
from huatuo_jax.data.records import Prompt
from huatuo_jax.judge.completions import NoCompletion, read_json
from huatuo_jax.judge.judgements import printable
from huatuo_jax.judge.offline import EXACT, OfflineName, is_of_clinic, refuse_unused_judge
from huatuo_jax.judge.openai import OpenAIJudgeConfig
from huatuo_jax.judge.replies import Structured
from huatuo_jax.judge.server import ServerConfig, key_from_environment, scrubbed
from huatuo_jax.judge.spending import BudgetConfig, RateLimits, read_price

_TIMEOUT_S = 20.0
_SHOWN = 8
_NO_LIST = (404, 405, 501)  # The answers of servers that implement nothing but chats.


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The judge: an offline one, or a model behind an OpenAI-compatible server.

    Attributes:
        base_url: an OpenAI-compatible server's address, with its `/v1`; None for an offline judge.
        offline: the offline judge: `rubric`, which is fixed and no substitute for a judge that
            reads; `clinic`, which knows the truth about the clinic's prompts and judges no others;
            `auto` takes the clinic's where all judged prompts are the clinic's, else the rubric.
        clinic_judge: the fields of the clinic's judge: noise, biases to plant, and whether it knows
            the true disease. The evaluation always asks the exact one.
        model: the judge's name on the server; None for the only model of the server.
        max_cost: money that all runs may spend, in the currency of the price table.
        max_requests: calls that all runs may make.
        requests_per_minute: what the server allows.
        tokens_per_minute: what the server allows.
        timeout_s: seconds that a call may take.
        structured: "json_schema" or "json_object" where the server can enforce a reply format.
        max_tokens: tokens of a reply at most, its reasoning included.
        prices: file of the price table; None for the shipped one.
    """

    base_url: Text | None = operational(None)
    offline: Literal["auto"] | OfflineName = "auto"
    clinic_judge: ClinicJudge = EXACT
    model: str | None = None
    max_cost: float | None = operational(None)
    max_requests: int | None = operational(None)
    requests_per_minute: int | None = operational(None)
    tokens_per_minute: int | None = operational(None)
    timeout_s: float = operational(120.0)
    structured: Structured = "json_schema"
    max_tokens: int = operational(1024)
    prices: str | None = operational(None)

    def __post_init__(self) -> None:
        """Validates the judge, and refuses fields that an offline one ignores."""
        if self.base_url is None:
            for name in ("model", "max_cost", "max_requests"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is ignored by the offline judge; set base_url to use a model"
                    )
        else:
            self.openai(self.model or "the server's")
        refuse_unused_judge(
            self.clinic_judge, offline=self.offline, by_server=self.base_url is not None
        )

    def offline_for(self, prompts: Iterable[Prompt]) -> OfflineName:
        """Returns the name of the offline judge for these prompts.

        Raises:
            ValueError: the rubric judges, but fields of the clinic's judge are set.
        """
        name = self.offline
        if name == "auto":
            name = "clinic" if all(map(is_of_clinic, prompts)) else "rubric"
        refuse_unused_judge(self.clinic_judge, offline=name, by_server=self.base_url is not None)
        return name

    def openai(self, model: str) -> OpenAIJudgeConfig:
        """Returns the config of the judge behind the server, under this model name."""
        assert self.base_url is not None
        limits = RateLimits(requests=self.requests_per_minute, tokens=self.tokens_per_minute)
        budget = BudgetConfig(max_requests=self.max_requests, max_cost=self.max_cost)
        return OpenAIJudgeConfig(
            model=model,
            structured=self.structured,
            max_tokens=self.max_tokens,
            prices=self.prices,
            require_reference=False,
            server=ServerConfig(
                base_url=self.base_url, budget=budget, limits=limits, timeout_s=self.timeout_s
            ),
        )


def reach_judge(cfg: JudgeConfig, *, field: str = "config.judge") -> OpenAIJudgeConfig | None:
    """Asks the server for its models, which costs nothing; returns None for an offline judge.

    Args:
        cfg: the judge.
        field: its path in the config, for messages.

    Returns:
        The judge to ask; where the config names no model, the server's only one.

    Raises:
        ValueError: no key, no answer from the server, an unknown model, several models to choose
            from, or a budget of money for a model without a price.
    """
    if cfg.base_url is None:
        return None
    key = key_from_environment()
    names = _models(cfg.base_url, key, field)
    if cfg.model is None and len(names or ()) != 1:
        there = ", ".join((names or ())[:_SHOWN]) or "none that it tells of"
        raise ValueError(
            f"{field}.model is not given, and {cfg.base_url} has several models or none: "
            f"{there}; name the judge's"
        )
    if cfg.model is not None and names is not None and cfg.model not in names:
        raise ValueError(
            f"{field}.model={cfg.model!r} is not at {cfg.base_url}, which has "
            f"{', '.join(names[:_SHOWN]) or 'none'}"
        )
    model = cfg.model or (names or [""])[0]
    if cfg.max_cost is not None and read_price(model, cfg.prices) is None:
        raise ValueError(
            f"{field}.max_cost={cfg.max_cost:g} needs a price for {model!r}: add it to a "
            f"copy of the price table and name the copy by {field}.prices"
        )
    return cfg.openai(model)


def _models(base_url: str, key: str, field: str) -> list[str] | None:
    """Returns the names of the server's models, or None if it answers but has no list."""
    client = openai.OpenAI(api_key=key, base_url=base_url, timeout=_TIMEOUT_S, max_retries=1)
    try:
        body = read_json(client.models.with_raw_response.list().content)
        listed = body.get("data") if isinstance(body, dict) else None
        if not isinstance(listed, list):
            return None
        ids = [one.get("id") for one in listed if isinstance(one, dict)]
        return [name for name in ids if isinstance(name, str)]
    except (openai.OpenAIError, NoCompletion) as error:
        if isinstance(error, openai.APIStatusError) and error.status_code in _NO_LIST:
            return None
        reason = printable(scrubbed(str(error), key))
        raise ValueError(
            f"the judge at {base_url} does not answer as it should: {reason} "
            f"({field}.base_url, and the key in OPENAI_API_KEY)"
        ) from error
    finally:
        client.close()

"""The judge of a run: reached before anything is trained, so that it is not missed hours later."""

import openai

from huatuo_jax.feedback.completions import NoCompletion, read_json
from huatuo_jax.feedback.judgements import printable
from huatuo_jax.feedback.openai_judge import OpenAIJudgeConfig
from huatuo_jax.feedback.prices import read_price
from huatuo_jax.feedback.server_calls import key_from_environment
from huatuo_jax.feedback.server_faults import scrubbed
from huatuo_jax.rlaif.config import LabelsConfig

_TIMEOUT_S = 20.0
_SHOWN = 8
_NO_LIST = (404, 405, 501)  # What servers say that answer chats and nothing else.


def reach_judge(cfg: LabelsConfig) -> OpenAIJudgeConfig | None:
    """Asks the server for its models, which costs nothing; None for the offline judge.

    Returns:
        What to ask; where the config names no model, the only one that the server has.

    Raises:
        ValueError: no key, a server that does not answer or does not have the model, several models
            to choose from, or a budget of money for a model without a price.
    """
    if cfg.base_url is None:
        return None
    key = key_from_environment()
    names = _models(cfg.base_url, key)
    if cfg.model is None and len(names or ()) != 1:
        there = ", ".join((names or ())[:_SHOWN]) or "none that it tells of"
        raise ValueError(
            f"config.labels.model is not given, and {cfg.base_url} has several models or none: "
            f"{there}; name the judge's"
        )
    if cfg.model is not None and names is not None and cfg.model not in names:
        raise ValueError(
            f"config.labels.model={cfg.model!r} is not at {cfg.base_url}, which has "
            f"{', '.join(names[:_SHOWN]) or 'none'}"
        )
    model = cfg.model or (names or [""])[0]
    if cfg.max_cost is not None and read_price(model, cfg.prices) is None:
        raise ValueError(
            f"config.labels.max_cost={cfg.max_cost:g} needs a price for {model!r}: add it to a "
            "copy of the price table and name the copy by config.labels.prices"
        )
    return cfg.openai(model)


def _models(base_url: str, key: str) -> list[str] | None:
    """The names of the server's models; None where it answers but has no list."""
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
            "(config.labels.base_url, and the key in OPENAI_API_KEY)"
        ) from error
    finally:
        client.close()

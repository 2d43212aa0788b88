"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them and lm-eval asks them."""

import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from huatuo_jax.generation.saved_model import SavedModel
from huatuo_jax.serving.answering import Answering
from huatuo_jax.serving.bodies import DetokenizeBody, TokenizeBody
from huatuo_jax.serving.errors import refuse
from huatuo_jax.serving.exchange import body_of
from huatuo_jax.serving.models import Policy, Reward
from huatuo_jax.serving.tokens import plain_text


async def tokenize(http: Request, answering: Answering) -> Response:
    """Returns the tokens of a text, or of a conversation in the model's template."""
    body = await body_of(http, TokenizeBody)
    model = answering.served.any(body.model)
    token_ids = await answering.aside(functools.partial(_token_ids, model, body))
    found: dict[str, Any] = {
        "tokens": token_ids,
        "count": len(token_ids),
        "max_model_len": model.max_length,
    }
    if body.return_token_strs:
        found["token_strs"] = model.saved.tokenizer.convert_ids_to_tokens(token_ids)
    return JSONResponse(found)


def _token_ids(model: Policy | Reward, body: TokenizeBody) -> list[int]:
    if body.prompt is None:
        return model.chat_prompt(body.messages or ())
    return model.text_prompt(body.prompt, add_special_tokens=body.add_special_tokens)


async def detokenize(http: Request, answering: Answering) -> Response:
    """Returns the text of tokens, special ones included."""
    body = await body_of(http, DetokenizeBody)
    tokenizer = answering.served.any(body.model).saved.tokenizer
    size = len(tokenizer)
    if unknown := [token_id for token_id in body.tokens if token_id >= size]:
        refuse("tokens", f"{unknown[0]} is no token; they are 0 to {size - 1}")
    text = await answering.aside(functools.partial(plain_text, tokenizer, body.tokens))
    return JSONResponse({"prompt": text})


def information(saved: SavedModel) -> dict[str, Any]:
    """Returns what a client needs to tokenize by this server."""
    tokenizer = saved.tokenizer
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "tokenizer_class": type(tokenizer).__name__,
        **{name: tokenizer.special_tokens_map.get(name) for name in names},
        "chat_template": saved.template.to_jinja(tokenizer),
        "vocab_size": len(tokenizer),
        "stop_token_ids": list(saved.stop_token_ids),
    }

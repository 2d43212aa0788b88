"""Random requests: each has an answer or one clear error, and the server stays well."""

import copy
import http.client
import json
import random

import pytest

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.generation.saved_model import open_saved_model
from tests.api import tiny
from tests.serving import live

MESSAGES = [
    {"role": "system", "content": "你是医生"},
    {"role": "user", "content": "头痛"},
    {"role": "assistant", "content": "多久了？"},
    {"role": "user", "content": [{"type": "text", "text": "三天 \U0001f912"}]},
]
SAMPLING = {
    "n": 2,
    "seed": 3,
    "stop": ["。"],
    "stop_token_ids": [7],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "max_tokens": 5,
    "min_tokens": 1,
    "stream": True,
    "stream_options": {"include_usage": True},
}
BODIES = {
    "/v1/chat/completions": {"model": "policy", "messages": MESSAGES, "logprobs": True, **SAMPLING},
    "/v1/completions": {"model": "policy", "prompt": [[5, 6], [7]], "logprobs": 0, **SAMPLING},
    "/v1/classify": {"model": "policy", "messages": MESSAGES, "responses": ["好"]},
    "/tokenize": {"prompt": "头痛", "add_special_tokens": False, "return_token_strs": True},
    "/detokenize": {"model": "policy", "tokens": [5, 6, 7]},
}
ODD = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**40, 1.5, -0.0, 1e308, 1e-308, "", " ", "a"),
    *("\x00", "\ufffd", "\u202e", "\U0001f468\u200d\U0001f469", "</s>", "<|im_start|>", "头" * 999),
    *([], {}, [[]], [None], [{}], {"a": 1}, [1, "a"], [[1], "a"], ["a", "b", "c", "d", "e"]),
    *([2047], [2048], [-1], [10**9], {"role": "user"}, [{"role": "user", "content": None}]),
)
RAW = (
    b"",
    b"null",
    b"[",
    b"{]",
    b"\xff\xfe",
    b'{"model": "\\ud83d"}',
    b"NaN",
    b"1" * 5000,
    b"[" * 9999,
)
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH")
FINE = (200, 400, 404, 405, 413, 415, 429)


def places(value, path=()):
    """All places in a value of JSON."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(body, generator):
    """A body with some of its parts replaced, left out or added."""
    body = copy.deepcopy(body)
    for name in [*body]:
        if generator.random() < 0.4:
            del body[name]
    for _ in range(generator.randrange(3)):
        path = generator.choice([*places(body)])
        if not path:
            body[generator.choice(("tools", "x", "echo", "best_of", "user"))] = copy.deepcopy(
                generator.choice(ODD)
            )
            continue
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = copy.deepcopy(generator.choice(ODD))
    return body


@pytest.fixture(scope="module")
def server(tmp_path_factory, on_one_device):
    folder = tiny.save(tmp_path_factory.mktemp("models") / "policy", "lm")
    saved = open_saved_model(str(folder), head="lm", mesh=MeshConfig())

    def write(request, index):
        yield from range(5, 2000)

    served = live.scripted(saved, write, slots=8)
    # The engine's own check of a request, without its weights.
    engine = served.policies["policy"].engine.engine
    engine.check = lambda request: check(request)
    with live.serve(served) as found:
        yield found


def check(request):
    ids = (*request.prompt_token_ids, *request.sampling.stop_token_ids)
    if any(not 0 <= one < 2048 for one in ids) or len(request.sampling.stop_token_ids) > 16:
        raise ValueError("an id that is none")


def ask(connection, method, path, data, headers):
    connection.request(method, path, data, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


@pytest.mark.parametrize("number", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_request_makes_the_server_fail(server, number, caplog):
    generator = random.Random(number)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    seen = set()
    for _ in range(number):
        path = generator.choice([*BODIES])
        data = json.dumps(changed(BODIES[path], generator)).encode()
        method, headers = "POST", {"Content-Type": "application/json"}
        kind = generator.random()
        if kind < 0.1:
            data = generator.choice(RAW)
        elif kind < 0.15:
            method = generator.choice(METHODS)
        elif kind < 0.2:
            headers = {"Content-Type": generator.choice(("", "text/plain", "application/json;x"))}
        elif kind < 0.23:
            path = generator.choice(
                ("/v1/models/%00", "/%2e%2e/etc", "/v1/", "//", "/tokenizer_info?model=%ff")
            )
        status, found, content = ask(connection, method, path, data, headers)
        assert status in FINE, (method, path, data, content)
        seen.add(status)
        if status >= 400 and method != "HEAD":
            error = json.loads(content)["error"]
            assert error["message"] and "\n" not in error["message"], data
        if status == 200 and "event-stream" in found["Content-Type"]:
            assert content.endswith(b"data: [DONE]\n\n") and b'"error"' not in content, data
    connection.close()
    assert {200, 400} <= seen and not caplog.text
    server.wait_until_idle()
    assert server.ask("GET", "/health")[0] == 200

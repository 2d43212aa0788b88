"""Faults: clients that leave, a step that fails, a full queue, a wrong key, bad bodies, the end."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import openai
import pytest

from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.answers import text_of
from huatuo_jax.generation import streaming
from huatuo_jax.generation.saved_model import open_saved_model
from huatuo_jax.serving import calls
from huatuo_jax.serving.models import Policy
from tests.api import tiny
from tests.serving import live

CHAT = "/v1/chat/completions"
POISON = "毒"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, on_one_device):
    folder = tiny.save(tmp_path_factory.mktemp("models") / "policy", "lm")
    return open_saved_model(str(folder), head="lm", mesh=MeshConfig())


@pytest.fixture(scope="module")
def script(saved):
    """Writes an answer that follows from the prompt, the seed and the index; 毒 fails."""
    tokenizer = saved.tokenizer
    words = tokenizer.encode("发烧要多喝水，按时吃药，注意休息。", add_special_tokens=False)
    (poison,) = tokenizer.encode(POISON, add_special_tokens=False)[-1:]

    def write(request, index):
        if poison in request.prompt_token_ids:
            raise RuntimeError("secret: a patient's words")
        first = sum(request.prompt_token_ids) + request.seed + 7 * index
        for place in range(10_000):
            yield words[(first + place * place) % len(words)]

    return write


def body(text="头痛", **fields):
    message = {"role": "user", "content": text}
    return {"model": "policy", "messages": [message], "max_tokens": 8, "seed": 1, **fields}


def content(found):
    return found["choices"][0]["message"]["content"]


def send_raw(server, data):
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


def request_bytes(fields, *, length=None, path=CHAT):
    data = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Content-Length: {length or len(data)}\r\n\r\n"
    )
    return head.encode() + data


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(saved, script, stream):
    served = live.scripted(saved, script)
    with live.serve(served) as server:
        engine = server.policy.engine
        clients = [
            send_raw(server, request_bytes(body(max_tokens=100_000, stream=stream, n=2)))
            for _ in range(3)
        ]
        while engine.unfinished < 6 or not engine.engine.steps:
            time.sleep(0.005)
        for client in clients:
            client.close()
        server.wait_until_idle()
        assert server.ask("POST", CHAT, body())[0] == 200
        assert server.metric("dropped_calls_total") == 3


def test_half_a_request_holds_nothing_and_others_are_answered(saved, script):
    with live.serve(live.scripted(saved, script)) as server:
        half = send_raw(server, request_bytes(body(), length=100_000))
        assert server.ask("POST", CHAT, body())[0] == 200
        assert server.policy.engine.unfinished == 0
        half.close()
        assert server.ask("POST", CHAT, body())[0] == 200


def test_a_slow_reader_gets_the_whole_text_and_holds_nobody_up(saved, script):
    with live.serve(live.scripted(saved, script)) as server:
        fields = body(max_tokens=2000, n=4)
        whole = server.ask("POST", CHAT, fields)[2]
        slow = send_raw(server, request_bytes(fields | {"stream": True}))
        assert server.ask("POST", CHAT, body())[0] == 200
        server.wait_until_idle()  # Though nothing was read yet.
        slow.settimeout(10)
        data = b""
        while b"[DONE]" not in data:
            data += slow.recv(4096)
        texts = [""] * 4
        for line in data.decode().splitlines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
        assert texts == [one["message"]["content"] for one in whole["choices"]]


def test_a_poisoned_request_fails_alone(saved, script, caplog):
    with live.serve(live.scripted(saved, script, slots=8)) as server:
        texts = [f"问题{number}" for number in range(12)]
        alone = [content(server.ask("POST", CHAT, body(text))[2]) for text in texts]
        engine = server.policy.engine.engine
        engine.gate.clear()
        found = {}

        def ask(text):
            found[text] = server.ask("POST", CHAT, body(text))

        threads = [threading.Thread(target=ask, args=(one,)) for one in [*texts, POISON]]
        for thread in threads:
            thread.start()
        while server.policy.engine.unfinished < 13:
            time.sleep(0.005)
        engine.gate.set()
        for thread in threads:
            thread.join()
        assert [content(found[text][2]) for text in texts] == alone
        status, _, told = found[POISON]
        assert status == 500
        assert told["error"]["message"] == "the model failed on this request"
        assert server.ask("GET", "/health")[0] == 200
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text


def test_a_fault_outside_of_the_engine_is_one_error_too(saved, script, caplog, monkeypatch):
    def fail(self, prompts, num_top):
        raise RuntimeError("secret")

    monkeypatch.setattr(Policy, "score", fail)
    asked = {"model": "policy", "prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 1}
    with live.serve(live.scripted(saved, script)) as server:
        status, headers, told = server.ask("POST", "/v1/completions", asked)
        assert status == 500 and told["error"]["type"] == "server_error"
        assert headers["X-Frame-Options"] == "DENY"
        assert server.ask("POST", CHAT, body())[0] == 200
    assert "RuntimeError while answering a request" in caplog.text
    assert "secret" not in caplog.text


def test_a_stream_that_fails_ends_with_the_error(saved, script):
    with live.serve(live.scripted(saved, script)) as server:
        chunks = server.client().chat.completions.create(**body(POISON), stream=True)
        with pytest.raises(openai.APIError, match="the model failed on this request"):
            list(chunks)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_text_that_a_tokenizer_takes_back_ends_a_stream_with_an_error(
    saved, script, monkeypatch, path
):
    read = threading.Event()

    def write(request, index):
        for number, token_id in enumerate(script(request, index)):
            yield token_id
            assert number or read.wait(60)

    def other(tokenizer, token_ids):
        return f"!{text_of(tokenizer, token_ids)}"

    monkeypatch.setattr(streaming, "text_of", other)
    fields = body() if path == CHAT else {"prompt": [5, 6, 7], "max_tokens": 8}
    asked = {"model": "policy", **fields}
    with live.serve(live.scripted(saved, write)) as server:
        stream = send_raw(server, request_bytes(asked | {"stream": True}, path=path))
        data = b""
        while b'"!' not in data:
            data += stream.recv(4096)
        read.set()
        while b"cannot be streamed; ask for them without stream" not in data:
            data += stream.recv(4096)
        server.wait_until_idle()
        assert b"[DONE]" not in data
        assert server.ask("POST", path, asked)[0] == 200


def test_a_stream_without_news_is_kept_open_by_comments(saved, script, monkeypatch):
    monkeypatch.setattr(calls, "_QUIET_S", 0.01)
    with live.serve(live.scripted(saved, script)) as server:
        engine = server.policy.engine.engine
        engine.gate.clear()
        waiting = send_raw(server, request_bytes(body(stream=True)))
        data = b""
        while b": waiting\n\n" not in data:
            data += waiting.recv(4096)
        engine.gate.set()
        while b"[DONE]" not in data:
            data += waiting.recv(4096)


def test_a_dead_engine_is_told_by_health_and_by_every_answer(saved):
    def write(request, index):
        raise RuntimeError

    with live.serve(live.scripted(saved, write)) as server:
        assert server.ask("GET", "/health")[0] == 200
        assert server.ask("POST", CHAT, body())[0] == 503
        assert server.ask("GET", "/health")[0] == 503
        status, _, told = server.ask("POST", CHAT, body())
        assert status == 503 and "started anew" in told["error"]["message"]


def test_a_full_queue_answers_429_and_when_to_come_back(saved, script):
    served = live.scripted(saved, script, slots=2)
    with live.serve(served, max_waiting=3) as server:
        engine = server.policy.engine.engine
        engine.gate.clear()
        waiting = send_raw(server, request_bytes(body(n=5)))
        while server.policy.engine.waiting < 3:
            time.sleep(0.005)
        status, headers, told = server.ask("POST", CHAT, body())
        assert status == 429 and int(headers["Retry-After"]) >= 1
        assert told["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError, match="3 answers are waiting"):
            server.client().chat.completions.create(**body())
        engine.gate.set()
        server.wait_until_idle()
        assert server.ask("POST", CHAT, body())[0] == 200
        waiting.close()


def test_a_wrong_key_is_refused_everywhere_but_at_the_page_and_the_health(saved, script):
    with live.serve(live.scripted(saved, script), api_keys=["right"]) as server:
        for path in ("/v1/models", "/metrics", "/tokenizer_info", "/openapi.json", "/nowhere"):
            assert server.ask("GET", path)[0] == 401, path
            assert server.ask("GET", path, Authorization="Bearer wrong")[0] == 401, path
        assert server.ask("GET", "/")[0] == server.ask("GET", "/health")[0] == 200
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            server.client(api_key="wrong").models.list()
        assert server.client(api_key="right").models.list().data[0].id == "policy"


def test_only_named_origins_may_ask_from_a_browser(saved, script):
    asked = {"Origin": "https://a.org", "Access_Control_Request_Method": "POST"}
    with live.serve(live.scripted(saved, script)) as server:
        found = server.ask("OPTIONS", CHAT, **asked)[1]
        assert found["Access-Control-Allow-Origin"] is None
    options = {"cors": ["https://a.org"], "api_keys": ["right"]}
    with live.serve(live.scripted(saved, script), **options) as server:
        status, found, _ = server.ask("OPTIONS", CHAT, **asked)
        assert status == 200 and found["Access-Control-Allow-Origin"] == "https://a.org"
        asked["Origin"] = "https://b.org"
        assert server.ask("OPTIONS", CHAT, **asked)[1]["Access-Control-Allow-Origin"] is None


IMAGE = [{"type": "image_url", "image_url": {"url": "x"}}]
WRONG = [
    (b"{", "the body is no JSON", None),
    (b"[" * 100_000, "the body is no JSON", None),
    (b'{"model": "\\ud800"}', "the body is no JSON", None),
    (b"[]", "the body: should be an object", None),
    (body(messages=[]), "messages: list should have at least 1 item", "messages"),
    (body(messages="x"), "messages: should be a valid array", "messages"),
    (body(temperature="hot"), "temperature: should be a valid number", "temperature"),
    (body(temperature=-1), "temperature: should be greater than or equal to 0", "temperature"),
    (body(temperature=1e-9), "temperature: should be 0 (greedy) or at least", "temperature"),
    (body(top_p=0), "top_p: should be greater than 0", "top_p"),
    (body(n=0), "n: should be greater than or equal to 1", "n"),
    (body(seed=1.5), "seed: should be a valid integer", "seed"),
    (body(stop=list("abcde")), "stop: ", "stop"),
    (body(stop=""), "stop: ", "stop"),
    (body(stop_token_ids=[9999]), "messages: stop_token_ids has [9999]", "messages"),
    (body(min_tokens=9), "min_tokens: should be at most max_tokens, 8", "min_tokens"),
    (body(max_tokens=0), "max_tokens: should be at least 1", "max_tokens"),
    (body(max_completion_tokens=9), "max_completion_tokens: differs", "max_completion_tokens"),
    (body(top_logprobs=2), "top_logprobs: only with logprobs=true", "top_logprobs"),
    (body(stream_options={}), "stream_options: only with stream=true", "stream_options"),
    (body(tools=[{}]), "tools: this server does not have it", "tools"),
    (body(response_format={"type": "json_object"}), "response_format: this", "response_format"),
    (body(logit_bias={"5": 1}), "logit_bias: this server does not have it", "logit_bias"),
    (body(frequency_penalty=0.5), "frequency_penalty: this server", "frequency_penalty"),
    (body(temprature=1), "unknown field 'temprature'; did you mean temperature?", "temprature"),
    (body(messages=[{"role": "user", "content": IMAGE}]), "type 'image_url'", "messages"),
    (body(messages=[{"role": "tool", "content": "x"}]), "the role 'tool'", "messages"),
    (body(messages=[{"role": "user"}]), "messages[0].content: field", "messages[0].content"),
    (body(messages=[{"role": "assistant", "content": "x"}]), "messages: ", "messages"),
    (body(" "), "messages: turn 1 (user) is empty", "messages"),
    (body("头痛" * 300), "more than the 255 that it may have", "messages"),
    (body("a" * 1_000_000), "messages: turn 1 (user) has 1,000,000 characters", "messages"),
]
NEUTRAL = {
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": None,
    "user": "u",
    "metadata": {"a": "b"},
    "store": False,
    "n": 1,
    "stop": None,
}


@pytest.fixture(scope="module")
def server(saved, script):
    with live.serve(live.scripted(saved, script)) as found:
        found.policy.engine.engine.check = check_stop_ids
        yield found


def check_stop_ids(request):
    if unknown := [one for one in request.sampling.stop_token_ids if one >= 2048]:
        raise ValueError(f"stop_token_ids has {unknown}")


@pytest.mark.parametrize(("sent", "told", "param"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_body_is_one_clear_error(server, sent, told, param):
    status, headers, found = server.ask("POST", CHAT, sent)
    assert status == 400, found
    error = found["error"]
    assert told in error["message"] and "\n" not in error["message"]
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert "Traceback" not in json.dumps(found)


def test_fields_that_ask_for_nothing_are_taken(server):
    assert server.ask("POST", CHAT, body(**NEUTRAL))[0] == 200


def test_errors_of_routing_have_the_same_shape(server):
    for method, path, sent, status in (
        ("GET", "/v1/nothing", None, 404),
        ("GET", CHAT, None, 405),
        ("POST", CHAT, body(model="other"), 404),
        ("GET", "/v1/models/other", None, 404),
    ):
        found = server.ask(method, path, sent)
        assert found[0] == status and set(found[2]["error"]) == {"message", "type", "param", "code"}
    status, _, found = server.ask("POST", CHAT, b"x", Content_Type="text/plain")
    assert status == 415 and "application/json" in found["error"]["message"]
    status, _, found = server.ask("POST", CHAT, b" " * (17 * 2**20))
    assert status == 413


def test_the_page_and_all_responses_have_their_headers(server):
    status, headers, page = server.ask("GET", "/")
    assert status == 200 and b"<title>" in page and "text/html" in headers["Content-Type"]
    for path in ("/", "/v1/models", "/nowhere", "/health"):
        headers = server.ask("GET", path)[1]
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff"


def test_nothing_that_was_written_is_logged(server, caplog, capfd):
    with caplog.at_level("DEBUG"):
        server.ask("POST", CHAT, body("秘密的头痛"))
        server.ask("POST", CHAT, body("秘密的头痛", temperature=-1))
    written = caplog.text + "".join(capfd.readouterr())
    assert "秘密" not in written


def test_at_the_end_answers_under_way_are_finished(saved, script):
    served = live.scripted(saved, script, slots=4)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(live.serve(served))
        alone = content(server.ask("POST", CHAT, body())[2])
        engine = server.policy.engine.engine
        engine.gate.clear()

        async def ask_32():
            client = server.async_client()
            chats = [client.chat.completions.create(**body()) for _ in range(32)]
            pending = [asyncio.ensure_future(chat) for chat in chats]
            while server.policy.engine.unfinished < 32:
                await asyncio.sleep(0.01)
            ending = threading.Thread(target=stack.close)
            ending.start()
            await asyncio.sleep(0.3)
            engine.gate.set()
            found = await asyncio.gather(*pending)
            await client.close()
            await asyncio.to_thread(ending.join)
            return [one.choices[0].message.content for one in found]

        assert asyncio.run(ask_32()) == [alone] * 32

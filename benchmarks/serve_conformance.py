"""The parts of OpenAI's interface that servers have: ours, `transformers serve`, and vLLM.

Each is started with the same small random model and asked by OpenAI's client; an entry is True
where the answer is the one that the interface promises. vLLM takes part where `--vllm_python` names
the interpreter of an environment that has its CPU build.

    python benchmarks/serve_conformance.py
"""

import contextlib
import importlib.metadata
import json
import pathlib
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import openai
import serve
import serve_contenders
from absl import app, flags, logging

_OUT = flags.DEFINE_string("table", "benchmarks/results/serve_conformance.json", "Where to.")

QUESTION = [{"role": "user", "content": "头痛三天，怎么办"}]
CHECKS: dict[str, Callable[["Server"], bool]] = {}


class Server:
    """A server to ask."""

    def __init__(self, port: int, model: str) -> None:
        """Makes a client."""
        self.root, self.model = f"http://127.0.0.1:{port}", model
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0)

    def chat(self, **fields: Any) -> Any:
        """Asks the question, greedily and for 12 tokens unless the fields say otherwise."""
        asked = {"model": self.model, "messages": QUESTION, "temperature": 0, "max_tokens": 12}
        return self.client.chat.completions.create(**asked | fields)

    def complete(self, **fields: Any) -> Any:
        """Continues a prompt likewise."""
        asked = {"model": self.model, "prompt": "头痛三天", "temperature": 0, "max_tokens": 12}
        return self.client.completions.create(**asked | fields)

    def text(self, **fields: Any) -> str:
        """Returns the text of a chat's first answer."""
        return str(self.chat(**fields).choices[0].message.content)

    def get(self, path: str, body: Any = None) -> str:
        """Returns what a path gives; a body is posted to it."""
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.root}{path}", data, kind)
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())


def check(name: str) -> Callable[[Callable[[Server], bool]], None]:
    """Adds a check under its name in the table."""

    def add(function: Callable[[Server], bool]) -> None:
        CHECKS[name] = function

    return add


def refused(call: Callable[[], object], *, status: int, word: str = "") -> bool:
    """Whether a call is refused with this status and a message in OpenAI's shape."""
    try:
        call()
    except openai.APIStatusError as error:
        told = error.body if isinstance(error.body, dict) else {}
        message = told.get("message")
        return error.status_code == status and isinstance(message, str) and word in message
    return False


def streamed(chunks: Any) -> str:
    """Returns the text of a streamed chat."""
    return "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)


@check("a chat: text, usage, finish reason at the limit")
def _(server: Server) -> bool:
    found = server.chat()
    return bool(found.usage.completion_tokens == 12 and found.choices[0].finish_reason == "length")


@check("the same text streamed")
def _(server: Server) -> bool:
    return streamed(server.chat(stream=True)) == server.text()


@check("`stream_options.include_usage`")
def _(server: Server) -> bool:
    last = list(server.chat(stream=True, stream_options={"include_usage": True}))[-1]
    return last.choices == [] and last.usage.completion_tokens == 12


@check("`n` answers")
def _(server: Server) -> bool:
    found = server.chat(n=3, temperature=1.0, seed=1)
    return [one.index for one in found.choices] == [0, 1, 2]


@check("`seed` decides a sampled answer")
def _(server: Server) -> bool:
    texts = [server.text(temperature=1.0, seed=seed) for seed in (5, 5, 6)]
    return texts[0] == texts[1] != texts[2]


@check("`logprobs` with `top_logprobs` and bytes")
def _(server: Server) -> bool:
    tokens = server.chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
    return len(tokens) == 12 and all(len(one.top_logprobs) == 3 and one.bytes for one in tokens)


@check("`logprobs` in a stream")
def _(server: Server) -> bool:
    told = [
        token
        for one in server.chat(stream=True, logprobs=True)
        for choice in one.choices
        if choice.logprobs
        for token in choice.logprobs.content or ()
    ]
    return len(told) == 12


@check("`stop` ends before the text, streamed too")
def _(server: Server) -> bool:
    whole = server.text(max_tokens=24)
    stop = whole[len(whole) // 2 :][:2]
    wanted = whole[: whole.index(stop)]
    given = ["never so", "nor so", stop]
    found = server.chat(max_tokens=24, stop=given)
    ended = found.choices[0].finish_reason == "stop"
    texts = [
        found.choices[0].message.content,
        streamed(server.chat(max_tokens=24, stop=given, stream=True)),
    ]
    return ended and all(one.rstrip() == wanted.rstrip() for one in texts)


@check("`max_completion_tokens`")
def _(server: Server) -> bool:
    asked = {"model": server.model, "messages": QUESTION, "max_completion_tokens": 3}
    found = server.client.chat.completions.create(**asked, temperature=0)
    return bool(found.usage.completion_tokens == 3)


@check("content as parts of text")
def _(server: Server) -> bool:
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    return server.text(messages=[{"role": "user", "content": parts}]) == server.text()


@check("`top_k`, `min_p`, `repetition_penalty`")
def _(server: Server) -> bool:
    best = server.text(temperature=1.0, extra_body={"top_k": 1}) == server.text()
    sure = server.text(temperature=1.0, extra_body={"min_p": 1.0}) == server.text()
    other = server.text(extra_body={"repetition_penalty": 50.0}, max_tokens=48)
    return best and sure and other != server.text(max_tokens=48)


@check("completions, of several prompts and of token ids")
def _(server: Server) -> bool:
    found = server.complete(prompt=[[5, 6, 7], [8, 9]])
    return len(found.choices) == 2 and found.usage.prompt_tokens == 5


@check("`echo` with the prompt's log-probabilities")
def _(server: Server) -> bool:
    told = server.complete(prompt=[5, 6, 7], echo=True, logprobs=1, max_tokens=1).choices[0]
    values = told.logprobs.token_logprobs
    return len(values) == 4 and values[0] is None and all(one < 0 for one in values[1:])


@check("a wrong value is an error in OpenAI's shape")
def _(server: Server) -> bool:
    return refused(lambda: server.chat(temperature="hot"), status=400, word="temperature")


@check("a misspelled field is refused")
def _(server: Server) -> bool:
    return refused(lambda: server.chat(extra_body={"temprature": 1}), status=400)


@check("a prompt that is too long is refused")
def _(server: Server) -> bool:
    message = [{"role": "user", "content": "头痛" * 2000}]
    return refused(lambda: server.chat(messages=message), status=400)


@check("an unknown model is refused with 404")
def _(server: Server) -> bool:
    return refused(lambda: server.chat(model="no/such-model"), status=404)


@check("`/v1/models`, `/health`")
def _(server: Server) -> bool:
    server.get("/health")  # Fails unless it is well.
    return bool(server.client.models.list().data)


@check("`/metrics` for Prometheus")
def _(server: Server) -> bool:
    return "# TYPE" in server.get("/metrics")


@check("`/tokenize` and `/detokenize`")
def _(server: Server) -> bool:
    body = {"model": server.model, "prompt": "头痛", "add_special_tokens": False}
    tokens = json.loads(server.get("/tokenize", body))["tokens"]
    back = server.get("/detokenize", {"model": server.model, "tokens": tokens})
    return "头痛" in json.loads(back)["prompt"]


@check("a web page")
def _(server: Server) -> bool:
    return "<html" in server.get("/")


@contextlib.contextmanager
def ours(folder: pathlib.Path) -> Iterator[int]:
    """Serves by this project while the context lasts."""
    with serve_contenders.our_server(folder) as (port, _):
        yield port


def main(_: list[str]) -> None:
    """Ask each server and write the table."""
    logging.set_verbosity(logging.WARNING)
    servers: dict[str, tuple[Any, str]] = {
        "ours": (ours, "ours"),
        "transformers": (serve_contenders.transformers_server, "MODEL"),
    }
    if serve_contenders.VLLM.value:
        servers["vllm"] = (serve_contenders.vllm_server, "vllm")
    table: dict[str, Any] = {"versions": {}, "checks": {name: {} for name in CHECKS}}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        serve.make_model(folder)
        for server, (start, model) in servers.items():
            with start(folder) as port:
                model = str(folder / "model") if model == "MODEL" else model
                table["versions"][server] = version_of(server, port)
                for what, function in CHECKS.items():
                    table["checks"][what][server] = holds(function, Server(port, model))
                    print(f"{server}: {what}: {table['checks'][what][server]}", flush=True)
            text = json.dumps(table, indent=2, ensure_ascii=False)
            pathlib.Path(_OUT.value).write_text(f"{text}\n", encoding="utf-8")


def version_of(server: str, port: int) -> str:
    """The version of a server; vLLM, of another environment, tells it itself."""
    if server == "vllm":
        return serve_contenders.vllm_version(port)
    return importlib.metadata.version({"ours": "huatuo_jax"}.get(server, server))


def holds(function: Callable[[Server], bool], server: Server) -> bool:
    """Whether a check holds; a call that fails does not."""
    try:
        return bool(function(server))
    except (openai.OpenAIError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return False


if __name__ == "__main__":
    app.run(main)

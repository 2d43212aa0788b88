"""The server on a free port of loopback in this process, with its own engine or a scripted one."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections import deque
from types import SimpleNamespace

import openai
import uvicorn

from huatuo_jax.generation.requests import Running, SamplingConfig, finished
from huatuo_jax.serving.app import make_app
from huatuo_jax.serving.models import Policy, Served
from huatuo_jax.serving.runner import ServedEngine
from huatuo_jax.serving.tokens import Tokens


class Live:
    """A server that answers.

    Attributes:
        served: its models.
        port: that it listens at.
    """

    def __init__(self, served, port):
        self.served, self.port = served, port

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}/"

    @property
    def base_url(self):
        return f"{self.address}v1"

    def client(self, **options):
        return openai.OpenAI(**self.options | options)

    def async_client(self, **options):
        return openai.AsyncOpenAI(**self.options | options)

    @property
    def options(self):
        return {"base_url": self.base_url, "api_key": "none", "max_retries": 0}

    @property
    def policy(self):
        return next(iter(self.served.policies.values()))

    def wait_until_idle(self):
        """Waits until no answer is waiting or under way, as far as the engine knows."""
        engine = self.policy.engine
        while engine.unfinished or engine.busy or engine.engine.busy:
            time.sleep(0.005)

    def ask(self, method, path, body=None, **headers):
        """Returns status, headers and content of a response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        named = {"Content-Type": "application/json"} if body is not None else {}
        named |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection.request(method, path, data, named)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if "application/json" in response.headers.get("Content-Type", ""):
            content = json.loads(content)
        return response.status, response.headers, content

    def metric(self, name):
        """The value of a metric, all labels together."""
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(one.split()[-1]) for one in lines if one.startswith(f"huatuo_{name}{{"))


@contextlib.contextmanager
def serve(served, **options):
    """Serves models while the context lasts."""
    app = make_app(served, **{"max_waiting": 64} | options)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listening:
        config = uvicorn.Config(app, lifespan="on", log_level="error", access_log=False)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield Live(served, listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


class ScriptedEngine:
    """An engine whose answers a test writes.

    Attributes:
        write: gives the token ids of an answer to a request, by its index; they are taken one by
            one, and an error that it raises is that of the step.
        gate: a step waits until it is set.
        steps: number of them.
    """

    def __init__(self, write, *, tokenizer, slots=4, max_length=256):
        self.write, self.tokenizer = write, tokenizer
        self.slots, self.max_length = slots, max_length
        self.gate = threading.Event()
        self.gate.set()
        self.steps, self.most_running = 0, 0
        self.count = 0
        self.queue = deque()
        self.writing = {}
        self.report = SimpleNamespace(
            cached_prompt_tokens=0, prompt_tokens=0, generated_tokens=0, pages_in_use=0
        )

    def check(self, request):
        pass

    def submit(self, request):
        for answer in range(request.num_answers):
            self.queue.append(Running(self.count, request, answer))
        self.count += 1
        return self.count - 1

    def abort(self, index):
        self.queue = deque(one for one in self.queue if one.request_index != index)
        self.writing = {
            key: one for key, one in self.writing.items() if one[0].request_index != index
        }

    def reset(self):
        self.queue.clear()
        self.writing.clear()

    @property
    def running(self):
        return [running for running, _ in self.writing.values()]

    @property
    def busy(self):
        return bool(self.queue or self.writing)

    def step(self):
        self.gate.wait()
        self.steps += 1
        while self.queue and len(self.writing) < self.slots:
            running = self.queue.popleft()
            ids = iter(self.write(running.request, running.answer_index))
            self.writing[id(running)] = (running, ids)
        self.most_running = max(self.most_running, len(self.writing))
        answers = []
        for key, (running, ids) in [*self.writing.items()]:
            token_id = next(ids)
            running.token_ids.append(token_id)
            running.log_probs.append(-0.5)
            running.sampling_log_probs.append(-0.5)
            running.top_log_probs.append([])
            sampling = running.request.sampling
            over = (
                token_id in sampling.stop_token_ids
                or len(running.token_ids) >= sampling.max_new_tokens
            )
            answer = finished(running, active=not over, tokenizer=self.tokenizer)
            if answer is not None:
                answers.append(answer)
                del self.writing[key]
        return answers


def scripted(saved, write, *, slots=4, max_length=256, name="policy"):
    """Returns models: one whose answers are written by a test; see `ScriptedEngine`."""
    engine = ScriptedEngine(write, tokenizer=saved.tokenizer, slots=slots)
    policy = Policy(
        name=name,
        saved=saved,
        max_length=max_length,
        created=1,
        compute=None,
        sampling=SamplingConfig(temperature=0.0),
        engine=ServedEngine(engine, slots=slots),
        tokens=Tokens(saved.tokenizer),
    )
    return Served([policy], [])

"""Counts and times of the server, in Prometheus's text."""

import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from huatuo_jax.generation.requests import Answer
from huatuo_jax.serving.calls import Call, Growing, Update
from huatuo_jax.serving.models import Policy
from huatuo_jax.serving.runner import ServedEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAUGES: tuple[tuple[str, str, Callable[[ServedEngine], float]], ...] = (
    ("answers_waiting", "Answers that wait for a slot.", lambda engine: engine.waiting),
    ("answers_running", "Answers under way.", lambda engine: engine.running),
    ("slots_in_use", "Slots that hold an answer.", lambda engine: len(engine.engine.running)),
    (
        "cache_pages_in_use",
        "Pages of the cache that answers have.",
        lambda engine: engine.engine.report.pages_in_use,
    ),
    (
        "decoded_tokens",
        "Tokens written since the start, those of answers that clients left included.",
        lambda engine: engine.engine.report.generated_tokens,
    ),
    (
        "cached_prompt_tokens",
        "Tokens of prompts that the prefix cache held, since the start.",
        lambda engine: engine.engine.report.cached_prompt_tokens,
    ),
    (
        "computed_prompt_tokens",
        "Tokens of prompts that were run through the model, since the start.",
        lambda engine: engine.engine.report.prompt_tokens,
    ),
)


class Metrics:
    """The server's metrics; all calls are in the event loop."""

    def __init__(self, policies: Sequence[Policy]) -> None:
        """Starts at 0.

        Args:
            policies: the language models that are served.
        """
        self._registry = registry = CollectorRegistry()
        self._seen: dict[Call, dict[tuple[int, int], tuple[int, float]]] = {}

        def counter(name: str, does: str, *labels: str) -> Counter:
            return Counter(f"huatuo_{name}", does, labels, registry=registry)

        def histogram(name: str, does: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"huatuo_{name}", does, labels, registry=registry, buckets=buckets)

        self.responses = counter("responses", "Responses by path and status.", "path", "status")
        self.seconds = histogram(
            "response_seconds", "Seconds to the end of a response.", _LONG_S, "path"
        )
        self._first = histogram(
            "time_to_first_token_seconds", "Seconds to the first tokens.", _LONG_S, "model"
        )
        self._next = histogram(
            "time_per_output_token_seconds", "Seconds for each later token.", _SHORT_S, "model"
        )
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._generated = counter("generated_tokens", "Tokens of complete answers.", "model")
        self._dropped = counter("dropped_calls", "Calls that clients have left.", "model")
        self._gauges: list[tuple[Gauge, Callable[[ServedEngine], float]]] = [
            (Gauge(f"huatuo_{name}", does, ("model",), registry=registry), value)
            for name, does, value in _GAUGES
        ]
        self._policies = tuple(policies)

    def text(self) -> bytes:
        """Returns all of them."""
        for gauge, value in self._gauges:
            for policy in self._policies:
                gauge.labels(policy.name).set(value(policy.engine))
        return generate_latest(self._registry)

    def started(self, policy: Policy, call: Call) -> None:
        """Counts a call's prompts."""
        tokens = sum(len(one.prompt_token_ids) for one in call.requests)
        self._prompt_tokens.labels(policy.name).inc(tokens)
        self._seen[call] = {}

    def updated(self, policy: Policy, call: Call, update: Update) -> None:
        """Counts and times an answer's new tokens."""
        now_s = time.perf_counter()
        if call not in self._seen:
            return
        if not self._seen[call]:
            self._first.labels(policy.name).observe(now_s - call.started_s)
        state = update.state
        num_tokens = state.num_tokens if isinstance(state, Growing) else len(state.token_ids)
        key = (update.prompt, update.answer)
        if key in self._seen[call]:
            before, then_s = self._seen[call][key]
            if num_tokens > before:
                self._next.labels(policy.name).observe((now_s - then_s) / (num_tokens - before))
        self._seen[call][key] = (num_tokens, now_s)
        if isinstance(state, Answer):
            self._generated.labels(policy.name).inc(num_tokens)

    def finished(self, policy: Policy, call: Call) -> None:
        """Forgets a call, and counts it if it was left unfinished."""
        self._seen.pop(call, None)
        if call.remaining:
            self._dropped.labels(policy.name).inc()

"""The command that serves models over HTTP."""

import contextlib
import dataclasses
import importlib.util
import logging
import os
import signal
import socket
import sys

import jax

from huatuo_jax.api.in_use import Settings
from huatuo_jax.core.config import Text
from huatuo_jax.core.sharding import MeshConfig

KEY_VARIABLE = "HUATUO_API_KEY"
_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags:
    """Serves models: OpenAI's interface, reward scores, and a web page.

    Attributes:
        model: folders of ours, Hugging Face folders, or hub ids; `NAME=DIR` gives a name, which is
            otherwise the last part of the folder.
        reward_model: reward models likewise, for `/v1/classify` and the page.
        host: address to listen at; 0.0.0.0 for all of this machine's, which needs a key.
        port: 0 for any that is free.
        api_key: that clients have to send; None reads it from HUATUO_API_KEY, and without that
            everybody is served. Other users of the machine can see it on the command line.
        cors: origins whose web pages may ask, as https://example.org; `*` for all.
        max_waiting: answers that wait for a slot of a model before more are refused.
        slots: answers that a model writes at once.
        prefix_cache_tokens: of earlier prompts and answers that a model keeps, so that a later turn
            and a shared system text are not computed again; 0 for none.
        max_length: tokens of a conversation and its answer; None for the model's positions.
        template: chat template by name; None for each model's own.
        default_system: system text of conversations without one; None for the template's own.
        compute_dtype: None for float32 on CPU, bfloat16 elsewhere.
        mesh: division of the devices.
        drain_seconds: to finish the answers under way at the end; None for all it takes.
        log_requests: write a line for each request: address, path and status, and no text.
    """

    model: tuple[str, ...]
    reward_model: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    cors: tuple[Text, ...] = ()
    max_waiting: int = 256
    slots: int = 32
    prefix_cache_tokens: int = 8192
    max_length: int | None = None
    template: str | None = None
    default_system: str | None = None
    compute_dtype: str | None = None
    mesh: MeshConfig = MeshConfig()
    drain_seconds: int | None = None
    log_requests: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an invalid field."""
        if not self.model:
            raise ValueError("--model is missing; give the folder of a model")
        for name, least in (
            ("max_waiting", 1),
            ("slots", 1),
            ("port", 0),
            ("prefix_cache_tokens", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.port > 65535:
            raise ValueError(f"port={self.port} must be at most 65535")
        if self.drain_seconds is not None and self.drain_seconds < 0:
            raise ValueError(f"drain_seconds={self.drain_seconds} must be at least 0")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key is empty; leave it out to serve everybody")

    @property
    def settings(self) -> Settings:
        """Returns the settings of loading."""
        return Settings(
            template=self.template,
            default_system=self.default_system,
            mesh=self.mesh,
            compute_dtype=self.compute_dtype,
            max_length=self.max_length,
        )


def main(flags: Flags) -> None:
    """Serves until SIGTERM or Ctrl-C; answers under way are finished.

    Raises:
        ValueError: a package is missing, there is no such model, or a flag is invalid.
        OSError: weights cannot be read, or the port is in use.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} missing: pip install 'huatuo_jax[serve]'")
    if jax.process_count() > 1:
        raise ValueError("serving runs in one process; start it without the others")
    import uvicorn

    from huatuo_jax.serving.app import make_app
    from huatuo_jax.serving.models import load

    key = flags.api_key or os.environ.get(KEY_VARIABLE, "").strip()
    with _listen(flags.host, flags.port) as listening:  # Before the models, which take long.
        served = load(
            flags.model,
            flags.reward_model,
            flags.settings,
            slots=flags.slots,
            prefix_cache_tokens=flags.prefix_cache_tokens,
        )
        app = make_app(
            served,
            max_waiting=flags.max_waiting,
            api_keys=[key] if key else [],
            cors=flags.cors,
        )
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_level="info" if flags.log_requests else "warning",
            access_log=flags.log_requests,
            timeout_graceful_shutdown=flags.drain_seconds,
            server_header=False,
        )
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        names = ", ".join((*served.policies, *served.rewards))
        print(f"{names} at http://{shown}:{port}/ (interface: http://{shown}:{port}/v1)")
        sys.stdout.flush()
        logging.getLogger("huatuo_jax.serving").addHandler(logging.StreamHandler())
        # uvicorn ends at both signals, and raises them once more afterwards.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}") from error

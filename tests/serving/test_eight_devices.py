"""The server on a mesh of eight devices gives the texts of one."""

import jax
import pytest

from huatuo_jax.api.in_use import Settings
from huatuo_jax.core import sharding
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.serving.models import load
from tests.api import tiny
from tests.serving import live

QUESTIONS = [f"头痛{days}天了，怎么办？" for days in range(1, 13)]


def texts(folder, mesh):
    served = load([str(folder)], [], Settings(mesh=mesh), slots=8, prefix_cache_tokens=1024)
    with live.serve(served) as server:
        client = server.client()
        return [
            client.chat.completions.create(
                model="policy",
                messages=[{"role": "user", "content": question}],
                max_tokens=24,
                seed=3,
                temperature=temperature,
                n=2,
            )
            .choices[index]
            .message.content
            for question in QUESTIONS
            for temperature in (0, 1.0)
            for index in range(2)
        ]


@pytest.mark.slow
def test_on_eight_devices_the_texts_are_those_of_one(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path / "policy", "lm")
    divided = texts(folder, MeshConfig(data=4, fsdp=1, tensor=2))
    make_mesh = sharding.make_mesh
    with monkeypatch.context() as patch:
        patch.setattr(
            sharding,
            "make_mesh",
            lambda *, devices=None, **sizes: make_mesh(
                **sizes, devices=devices or jax.devices()[:1]
            ),
        )
        assert texts(folder, MeshConfig()) == divided

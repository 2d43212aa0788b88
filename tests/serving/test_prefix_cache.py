"""The server with a prefix cache, whose texts are those without."""

import pytest

from huatuo_jax.api.in_use import Settings
from huatuo_jax.serving.models import load
from tests.api import tiny
from tests.serving import live

SYSTEM = {"role": "system", "content": "你是一位耐心的医生，回答要简明，先问清病情，再给建议。" * 3}
QUESTIONS = ["头痛三天了，怎么办？", "咳嗽，有痰。", "发热两天。"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "policy", "lm", max_positions=512)


def conversations(server, *, turns=3, **fields):
    """Greedy answers of several conversations, each turn with all turns before it."""
    client, found = server.client(), []
    for question in QUESTIONS:
        messages = [SYSTEM]
        for _ in range(turns):
            messages.append({"role": "user", "content": question})
            chat = client.chat.completions.create(
                model="policy", messages=messages, max_tokens=24, **{"temperature": 0} | fields
            )
            content = chat.choices[0].message.content
            found.append(content)
            messages.append({"role": "assistant", "content": content or "嗯"})
    return found


@pytest.mark.slow
def test_a_prefix_cache_computes_less_and_changes_no_text(folder, on_one_device):
    with live.serve(load([str(folder)], [], Settings(), slots=4)) as server:
        without = conversations(server)
        computed = server.metric("computed_prompt_tokens")
        assert server.metric("cached_prompt_tokens") == 0
    served = load([str(folder)], [], Settings(), slots=4, prefix_cache_tokens=2048)
    with live.serve(served) as server:
        assert conversations(server) == without
        cached = server.metric("cached_prompt_tokens")
        assert cached > computed / 3
        assert server.metric("computed_prompt_tokens") + cached == pytest.approx(computed, abs=2)
        assert conversations(server) == without

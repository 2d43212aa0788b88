"""The server with its engine, asked by the openai client: the engine's tokens, streamed or not."""

import asyncio
import json
import math

import numpy as np
import openai
import pytest

from huatuo_jax import chat
from huatuo_jax.api.in_use import Settings
from huatuo_jax.api.models import load_reward_model
from huatuo_jax.data.python_data import as_prompt
from huatuo_jax.data.records import Message
from huatuo_jax.generation.requests import Request, SamplingConfig
from huatuo_jax.serving.models import load
from tests import browser
from tests.api import tiny
from tests.serving import live, test_page

QUESTIONS = [f"{tiny.QUESTION}{number}" for number in range(32)]
USER = [{"role": "user", "content": tiny.QUESTION}]
MOST = 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory, on_one_device):
    folder = tmp_path_factory.mktemp("models")
    return tiny.save(folder / "policy", "lm"), tiny.save(folder / "reward", "score", seed=2)


@pytest.fixture(scope="module")
def server(folders):
    policy, reward = map(str, folders)
    served = load([policy], [reward], Settings(), slots=4)
    with live.serve(served) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def by_engine(server):
    """Returns the engine's own answers to prompts, while the server is idle."""
    policy = server.policy

    def answers(prompts, *, seed=0, n=1, **sampling):
        how = policy.saved.with_stops(SamplingConfig(max_new_tokens=MOST, **sampling))
        server.wait_until_idle()
        requests = [
            Request(prompt_token_ids=one, sampling=how, seed=seed, num_answers=n) for one in prompts
        ]
        return policy.engine.engine.generate_in_order(requests)

    return answers


def prompt_of(server, text):
    saved = server.policy.saved
    return saved.template.prompt(as_prompt(text).messages, saved.tokenizer)


def content_of(server, answer):
    saved = server.policy.saved
    ended = answer.finish_reason == "stop"
    return saved.template.content_of(answer.text, saved.tokenizer, ended=ended)


def collected(chunks):
    """The texts, reasons and log-probabilities of a streamed chat by the answer's index."""
    found = {}
    for chunk in chunks:
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"text": "", "reason": None, "tokens": []})
            assert one["reason"] is None
            one["text"] += choice.delta.content or ""
            one["reason"] = choice.finish_reason
            one["tokens"] += choice.logprobs.content if choice.logprobs else []
    return found


def test_greedy_answers_are_the_engines_alone_and_beside_others_streamed_or_not(
    server, client, by_engine
):
    own = by_engine([prompt_of(server, one) for one in QUESTIONS], temperature=0.0)
    expected = [(content_of(server, one), one.finish_reason) for (one,) in own]

    def ask(text, **more):
        return {
            "model": "policy",
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": MOST,
            **more,
        }

    for text, one in zip(QUESTIONS[:3], expected[:3], strict=True):
        (choice,) = client.chat.completions.create(**ask(text)).choices
        assert (choice.message.content, choice.finish_reason) == one

    async def all_at_once():
        async with server.async_client() as many:

            async def whole(text):
                (choice,) = (await many.chat.completions.create(**ask(text))).choices
                return choice.message.content, choice.finish_reason

            async def streamed(text):
                stream = await many.chat.completions.create(**ask(text), stream=True)
                found = collected([chunk async for chunk in stream])[0]
                return found["text"], found["reason"]

            asked = [do(text) for text in QUESTIONS for do in (whole, streamed)]
            return await asyncio.gather(*asked)

    assert asyncio.run(all_at_once()) == [one for one in expected for _ in range(2)]


def test_a_seed_decides_all_answers_whatever_else_is_asked(server, client, by_engine):
    asked = {"model": "policy", "messages": USER, "max_tokens": MOST, "n": 3, "seed": 5}
    sampling = {"temperature": 1.5, "top_p": 0.9, "extra_body": {"top_k": 50, "min_p": 0.01}}
    whole = client.chat.completions.create(**asked, **sampling)
    texts = [one.message.content for one in whole.choices]
    (own,) = by_engine(
        [prompt_of(server, tiny.QUESTION)],
        seed=5,
        n=3,
        temperature=1.5,
        top_p=0.9,
        top_k=50,
        min_p=0.01,
    )
    assert texts == [content_of(server, one) for one in own] and len(set(texts)) == 3
    assert [one.index for one in whole.choices] == [0, 1, 2]
    noise = client.completions.create(model="policy", prompt="咳", max_tokens=200, n=3, stream=True)
    next(iter(noise))
    again = collected(client.chat.completions.create(**asked, **sampling, stream=True))
    assert [again[index]["text"] for index in range(3)] == texts
    noise.close()
    other = client.chat.completions.create(**asked | {"seed": 5 - 2**32}, **sampling)
    assert [one.message.content for one in other.choices] == texts
    other = client.chat.completions.create(**asked | {"seed": 6}, **sampling)
    assert [one.message.content for one in other.choices] != texts


def test_a_stream_has_its_parts_in_order_and_usage_where_it_is_asked_for(client):
    asked = {"model": "policy", "messages": USER, "max_tokens": MOST, "seed": 1}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert len(chunks) > 4
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    plain = list(client.chat.completions.create(**asked, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in plain)


def test_stops_and_limits_end_an_answer(server, client):
    asked = {"model": "policy", "messages": USER, "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=40).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    cut = whole[: whole.index(stop)].rstrip()
    for given in (stop, [stop, "never so"]):
        ended = client.chat.completions.create(**asked, max_completion_tokens=40, stop=given)
        assert ended.choices[0].finish_reason == "stop"
        assert ended.choices[0].message.content.rstrip() == cut
        stream = client.chat.completions.create(**asked, max_tokens=40, stop=given, stream=True)
        assert collected(stream)[0] == {
            "text": ended.choices[0].message.content,
            "reason": "stop",
            "tokens": [],
        }
    one = client.chat.completions.create(**asked, max_tokens=1)
    assert one.usage.completion_tokens == 1 and one.choices[0].finish_reason == "length"
    asked = {"model": "policy", "prompt": [5, 6], "max_tokens": 9, "temperature": 0}
    first = client.completions.create(**asked, logprobs=0).choices[0].logprobs.tokens[0]
    tokenizer = server.policy.saved.tokenizer
    (token_id,) = {
        tokenizer.convert_tokens_to_ids(one) for one in (first, f"\u2581{first.strip()}")
    } - {tokenizer.unk_token_id}
    ended = client.completions.create(**asked, extra_body={"stop_token_ids": [token_id]})
    assert ended.usage.completion_tokens == 1 and ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].text == ""


def test_log_probabilities_are_the_engines_with_bytes_and_the_best(server, client, by_engine):
    ((own,),) = by_engine([prompt_of(server, tiny.QUESTION)], temperature=0.7, seed=3)
    asked = {
        "model": "policy",
        "messages": USER,
        "temperature": 0.7,
        "seed": 3,
        "max_tokens": MOST,
        "logprobs": True,
        "top_logprobs": 4,
    }
    choice = client.chat.completions.create(**asked).choices[0]
    tokens = choice.logprobs.content
    assert [one.logprob for one in tokens] == pytest.approx(own.log_probs, abs=1e-5)
    for one in tokens:
        values = [top.logprob for top in one.top_logprobs]
        assert len(values) == 4 and values == sorted(values, reverse=True)
        assert one.logprob <= values[0]
        if one.token in [top.token for top in one.top_logprobs]:
            assert one.logprob in values
    special = server.policy.saved.tokenizer.all_special_tokens
    written = b"".join(bytes(one.bytes) for one in tokens if one.token not in special)
    assert written.decode(errors="replace").strip() == choice.message.content.strip()
    streamed = collected(client.chat.completions.create(**asked, stream=True))[0]
    assert streamed["tokens"] == tokens and streamed["text"] == choice.message.content


def test_completions_echo_prompts_with_their_log_probabilities(server, client):
    policy = server.policy
    prompts = [[5, 6, 7, 8, 9, 10], [300, 301, 302], [44]]
    expected = policy.score(prompts, 3)
    asked = {"model": "policy", "echo": True, "logprobs": 3, "temperature": 0}
    found = client.completions.create(**asked, prompt=prompts, max_tokens=1)
    assert [one.index for one in found.choices] == [0, 1, 2]
    for prompt, scored, choice in zip(prompts, expected, found.choices, strict=True):
        told = choice.logprobs
        lengths = {len(one) for one in (told.tokens, told.token_logprobs, told.top_logprobs)}
        assert lengths == {len(prompt) + 1} == {len(told.text_offset)}
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        assert told.token_logprobs[1:-1] == scored.log_probs
        for value, best in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
            assert value in best.values() and len(best) in (3, 4)
        assert choice.text.startswith(policy.saved.tokenizer.decode(prompt))
    only = client.completions.create(**asked, prompt=prompts[0], max_tokens=0)
    told = only.choices[0].logprobs.token_logprobs
    assert told[0] is None
    assert told[1:] == pytest.approx(found.choices[0].logprobs.token_logprobs[1:-1], abs=1e-5)
    assert only.usage.completion_tokens == 0
    with pytest.raises(openai.BadRequestError, match=r"prompt\[1\]: 256 tokens, 1 more than"):
        client.completions.create(**asked, prompt=[[5], [5] * 256], max_tokens=1)


def test_prompt_log_probabilities_are_those_of_the_engine(server, client, by_engine):
    """What the engine said of its own tokens is what the scorer says of them as a prompt."""
    ((own,),) = by_engine([[5, 6, 7]], temperature=0.0)
    whole = [5, 6, 7, *own.token_ids]
    found = client.completions.create(
        model="policy", prompt=whole, max_tokens=0, echo=True, logprobs=1
    )
    told = found.choices[0].logprobs.token_logprobs[3:]
    np.testing.assert_allclose(told, own.log_probs, atol=2e-4)


def test_completions_stream_what_they_give_at_once(client):
    asked = {
        "model": "policy",
        "prompt": ["头痛三天 ", "fever and cough"],
        "max_tokens": MOST,
        "n": 2,
        "seed": 4,
        "temperature": 1,
        "logprobs": 2,
        "echo": True,
    }
    whole = client.completions.create(**asked)
    texts, values, offsets = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            values[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [one.text for one in whole.choices]
    assert values == [one.logprobs.token_logprobs for one in whole.choices]
    assert offsets == [one.logprobs.text_offset for one in whole.choices]
    assert texts[0].startswith("头痛三天 ") and texts[3].startswith("fever and cough")
    for choice in whole.choices:
        told = choice.logprobs
        assert told.text_offset == sorted(told.text_offset)
        for token, place in zip(told.tokens, told.text_offset, strict=True):
            if token.isalnum():
                assert choice.text.startswith(token, place)


def test_reward_scores_are_raw_and_those_of_the_model(server, client, folders):
    model = load_reward_model(str(folders[1]))
    responses = ["多喝水。", "", "去医院检查一下。"]
    body = {"model": "reward", "messages": tiny.TURNS, "responses": responses}
    found = client.post("/classify", cast_to=object, body=body)
    own = model.score_batch([tiny.TURNS] * 3, responses, raw=True)
    assert [one["score"] for one in found["data"]] == pytest.approx(own, abs=1e-6)
    assert [one["index"] for one in found["data"]] == [0, 1, 2]
    assert found["usage"]["prompt_tokens"] == model.count_tokens([tiny.TURNS] * 3, responses)
    whole = [[*tiny.TURNS, {"role": "assistant", "content": one}] for one in responses if one]
    found = client.post("/classify", cast_to=object, body={"model": "reward", "input": whole})
    assert [one["score"] for one in found["data"]] == pytest.approx([own[0], own[2]], abs=1e-6)
    for wrong, told in (
        ({"model": "reward", "messages": tiny.TURNS}, "responses: is missing"),
        ({"model": "reward", "input": [tiny.TURNS]}, "should end with the assistant's response"),
        ({"model": "reward", "messages": tiny.TURNS, "responses": ["水" * 999]}, "more than 256"),
    ):
        with pytest.raises(openai.BadRequestError, match=told):
            client.post("/classify", cast_to=object, body=wrong)
    with pytest.raises(openai.NotFoundError, match="not a reward model"):
        client.post("/classify", cast_to=object, body=body | {"model": "policy"})
    with pytest.raises(openai.NotFoundError, match="for /v1/classify"):
        client.chat.completions.create(model="reward", messages=USER)


def test_models_are_listed_with_their_kind(server, client):
    listed = {one.id: one for one in client.models.list().data}
    assert {name: one.huatuo["kind"] for name, one in listed.items()} == {
        "policy": "policy",
        "reward": "reward",
    }
    assert client.models.retrieve("policy").max_model_len == 256


def test_texts_become_tokens_and_tokens_texts(server):
    tokenizer = server.policy.saved.tokenizer
    text = "头痛 fever </s>"
    for special in (True, False):
        asked = {"prompt": text, "add_special_tokens": special, "return_token_strs": True}
        found = server.ask("POST", "/tokenize", asked)[2]
        assert found["tokens"] == tokenizer.encode(text, add_special_tokens=special)
        assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    back = server.ask("POST", "/detokenize", {"tokens": found["tokens"]})[2]
    assert back["prompt"] == tokenizer.decode(found["tokens"])
    found = server.ask("POST", "/tokenize", {"messages": USER, "model": "policy"})[2]
    assert found["tokens"] == prompt_of(server, tiny.QUESTION)
    info = server.ask("GET", "/tokenizer_info")[2]
    assert info["eos_token"] == tokenizer.eos_token and "messages" in info["chat_template"]
    status, _, told = server.ask("POST", "/detokenize", {"tokens": [10**6]})
    assert status == 400 and told["error"]["param"] == "tokens"


def test_metrics_count_requests_and_tokens(server, client):
    before = [server.metric(f"{name}_tokens_total") for name in ("prompt", "generated")]
    used = client.chat.completions.create(model="policy", messages=USER, max_tokens=9, n=2).usage
    after = [server.metric(f"{name}_tokens_total") for name in ("prompt", "generated")]
    assert after[0] - before[0] == used.prompt_tokens
    assert after[1] - before[1] == used.completion_tokens
    assert server.metric("answers_running") == server.metric("answers_waiting") == 0
    server.wait_until_idle()
    assert server.metric("slots_in_use") == server.metric("cache_pages_in_use") == 0
    assert server.metric("decoded_tokens") >= after[1]
    text = server.ask("GET", "/metrics")[2].decode()
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds"):
        assert f'huatuo_{name}_bucket{{le="' in text
    assert 'huatuo_responses_total{path="/v1/chat/completions",status="200"}' in text


def test_the_terminal_talks_to_the_server(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    partner = chat.find_partner(chat.Flags(base_url=server.base_url, seed=3, temperature=1.0))
    question = (Message("user", tiny.QUESTION),)
    text = "".join(delta.text for delta in partner.stream(question))
    whole = server.client().chat.completions.create(
        model="policy", messages=USER, seed=3, temperature=1
    )
    assert text == whole.choices[0].message.content
    assert math.isfinite(partner.score(question, "多喝水。"))


def test_leaving_in_the_middle_of_a_stream_frees_the_engine(server, client):
    stream = client.chat.completions.create(
        model="policy",
        messages=USER,
        max_tokens=200,
        stream=True,
        n=4,
        extra_body={"min_tokens": 200},
    )
    next(iter(stream))
    stream.close()
    server.wait_until_idle()
    assert server.metric("answers_running") == 0


def test_the_engines_default_sampling_and_limit_hold_where_nothing_is_said(server, client):
    first, again = (
        client.chat.completions.create(model="policy", messages=USER).choices[0] for _ in range(2)
    )
    assert first.message.content == again.message.content  # Greedy, without a generation_config.
    assert first.finish_reason in ("stop", "length")


def test_the_page_shows_the_servers_answers_with_their_scores(server, client):
    asked = {"model": "policy", "messages": USER, "max_tokens": MOST, "temperature": 1}
    seed_of = {"seed": 7, "n": 2}
    texts = [
        one.message.content for one in client.chat.completions.create(**asked, **seed_of).choices
    ]
    body = {"model": "reward", "messages": USER, "responses": texts}
    scores = [one["score"] for one in client.post("/classify", cast_to=object, body=body)["data"]]
    with browser.chromium() as page:
        page.size(1280, 800)
        numbers = {"seed": 7, "max_tokens": MOST, "temperature": 1}
        test_page.enter(page, server, n=2, reward="reward", numbers=numbers)
        test_page.ask(page, tiny.QUESTION)
        test_page.until(page, "document.querySelectorAll('.score').length === 2")
        shown = page.run("document.body.innerText")
        kept = test_page.stored(page)
        assert all(json.dumps(text, ensure_ascii=False)[1:-1] in kept for text in texts)
        assert all(f"{score:.2f}" in shown.replace("\u2212", "-") for score in scores)
        assert not page.errors
        assert all(one.startswith((server.address, "data:")) for one in page.requests)

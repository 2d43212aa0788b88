import asyncio
import dataclasses
import itertools
import json

import pytest

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.judge.judgements import (
    CRITERIA,
    Judgement,
    current,
    for_each,
    question_key,
    read_judgements,
)

SCORES = {name: index + 1.0 for index, name in enumerate(CRITERIA)}


def scored(**changed):
    fields = {
        "id": "p",
        "key": "k",
        "protocol": "score",
        "answer": 1,
        "scores": SCORES,
        "judge": "j",
        "template": "t",
        "prompt_sha256": "a",
        "answer_sha256": ("b",),
    }
    return Judgement(**(fields | changed))


def compared(**changed):
    pairwise = {"protocol": "pairwise", "answer": None, "scores": None, "answer_sha256": ("b", "c")}
    return scored(**({**pairwise, "first": 2, "second": 0, "p_first": 0.25} | changed))


@pytest.mark.parametrize(
    "judgement",
    [
        scored(reason="因为", raw="{}", usage={"input_tokens": 3}, cost=0.5, latency_s=1.5),
        scored(scores=None, error="prose"),
        scored(scores=None, error="cut", failure="truncated", max_tokens=9),
        compared(),
        compared(p_first=None, error="HTTP 500"),
    ],
)
def test_a_judgement_comes_back_from_its_line(judgement):
    line = json.dumps(judgement.to_json(), ensure_ascii=False)
    assert Judgement.from_json(json.loads(line)) == judgement


def test_a_line_of_before_kinds_of_failure_were_known_is_read():
    row = scored(scores=None, error="prose").to_json()
    old = {name: value for name, value in row.items() if name not in ("failure", "max_tokens")}
    assert Judgement.from_json(old) == Judgement.from_json(row)
    with pytest.raises(ValueError, match="without .'error'."):
        Judgement.from_json({name: value for name, value in row.items() if name != "error"})


def test_a_line_has_the_fields_of_its_protocol_and_null_for_a_verdict_that_failed():
    row = scored(scores=None, error="prose").to_json()
    assert list(row)[:4] == ["id", "protocol", "answer", "scores"]
    assert row["scores"] is None and "p_first" not in row and "first" not in row
    row = compared().to_json()
    assert list(row)[:5] == ["id", "protocol", "first", "second", "p_first"]
    assert "scores" not in row and "answer" not in row


@pytest.mark.parametrize(
    ("make", "changed", "why"),
    [
        (scored, {"error": "prose"}, "either a verdict or an error"),
        (scored, {"scores": None}, "either a verdict or an error"),
        (scored, {"failure": "refused"}, "failure is 'refused'; beside an error"),
        (scored, {"scores": None, "error": "x", "failure": "bored"}, "failure is 'bored'"),
        (scored, {"scores": None, "error": "x", "failure": "truncated"}, "max_tokens belongs"),
        (scored, {"max_tokens": 9}, "max_tokens belongs"),
        (scored, {"p_first": 0.5}, "p_first does not belong"),
        (scored, {"answer": None}, "whole numbers"),
        (scored, {"answer": -1}, "whole numbers"),
        (scored, {"answer_sha256": ("b", "c")}, "2 hashes for 1 answers"),
        (scored, {"scores": {"overall": 1.0}}, "it should have informative"),
        (scored, {"scores": SCORES | {"overall": float("nan")}}, "it should be a number"),
        (scored, {"scores": SCORES | {"overall": True}}, "it should be a number"),
        (scored, {"protocol": "vote"}, "protocol is 'vote'"),
        (compared, {"p_first": 1.5}, "p_first is 1.5"),
        (compared, {"scores": SCORES}, "scores does not belong"),
        (compared, {"second": None}, "whole numbers"),
    ],
)
def test_a_judgement_that_says_too_little_or_too_much_is_refused(make, changed, why):
    with pytest.raises(ValueError, match=why):
        make(**changed)


def test_a_line_with_a_field_too_few_or_too_many_is_refused():
    row = scored().to_json()
    with pytest.raises(ValueError, match="without \\['raw'\\]"):
        Judgement.from_json({name: value for name, value in row.items() if name != "raw"})
    with pytest.raises(ValueError, match="unknown \\['vote'\\]"):
        Judgement.from_json({**row, "vote": 1})


def test_the_first_verdict_stands_and_supersedes_failures_in_any_order():
    failed = [scored(scores=None, error=f"fault {n}") for n in range(2)]
    good, other = scored(), scored(answer=0)
    for lines in itertools.permutations([*failed, good, other]):
        assert current(lines) == [other, good]
    assert current(failed) == [failed[1]]
    assert current([good, dataclasses.replace(good, reason="later")]) == [good]


def test_a_key_depends_on_all_that_is_asked_and_not_on_ids():
    prompt = Prompt("p", (Message("user", "疼。"),), "s", reference="休息。")

    def key(
        prompt=prompt, texts=("好。", "坏。"), settings=None, protocol="pairwise", template="t"
    ):
        return question_key(
            settings=settings or {"model": "m"},
            protocol=protocol,
            template=template,
            prompt=prompt,
            texts=texts,
        )

    keys = [
        key(),
        key(texts=("坏。", "好。")),
        key(texts=("好。坏。",)),
        key(settings={"model": "n"}),
        key(protocol="score"),
        key(template="u"),
        key(dataclasses.replace(prompt, reference=None)),
        key(dataclasses.replace(prompt, diagnosis="偏头痛")),
        key(dataclasses.replace(prompt, messages=(Message("user", "疼！"),))),
    ]
    assert len(set(keys)) == len(keys)
    assert key(dataclasses.replace(prompt, id="q", source="r", extra={"x": 1})) == keys[0]


def test_a_torn_last_line_is_passed_over_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "labels.jsonl"
    line = json.dumps(scored().to_json()) + "\n"
    path.write_text(line + line[:40], encoding="utf-8")
    assert list(read_judgements(path)) == [scored()]
    path.write_text(line + "{}\n" + line, encoding="utf-8")
    with pytest.raises(ValueError, match="labels.jsonl:2: not a judgement"):
        list(read_judgements(path))


@pytest.mark.parametrize("concurrency", [1, 3, 20])
def test_items_are_worked_on_once_each_and_so_many_at_once(concurrency):
    begun, under_way, most = [], 0, 0

    async def work(item):
        nonlocal under_way, most
        begun.append(item)
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1

    assert asyncio.run(for_each(iter(range(10)), work, concurrency=concurrency)) is None
    assert begun == list(range(10)) and most == min(concurrency, 10)


def test_after_a_failure_calls_under_way_are_finished_and_none_is_begun():
    begun, done, failed = [], [], asyncio.Event()

    async def work(item):
        begun.append(item)
        await asyncio.sleep(0)
        if item == 1:
            failed.set()
            raise OSError("no space left")
        await failed.wait()
        if item == 2:
            raise ValueError("a later one")
        done.append(item)

    error = asyncio.run(for_each(range(9), work, concurrency=3))
    assert isinstance(error, OSError) and str(error) == "no space left"
    assert begun == [0, 1, 2] and done == [0]

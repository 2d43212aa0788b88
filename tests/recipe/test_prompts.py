"""Prompts of files, and out of dialogues."""

import json

import pytest

from huatuo_jax.data.accounting import READ_FROM
from huatuo_jax.data.mixture import HeldOutConfig, dialogue_text
from huatuo_jax.data.readers import read_dialogues, read_prompts
from huatuo_jax.recipe.config import PromptsConfig
from huatuo_jax.recipe.prompts import (
    FOR_JUDGINGS,
    IN_BOTH,
    OF_FILES,
    OTHER_KIND,
    REPEATED,
    make_prompts,
    write_prompts,
)
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from tests.recipe.tiny import HELD_OUT, write_dialogues


def data(*paths, held_out=HELD_OUT, **source):
    sources = tuple(SourceConfig(name=path.stem, paths=(str(path),), **source) for path in paths)
    return DataConfig(sources=sources, held_out=held_out)


def talk(path, *texts, kind=None, name="talk"):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    row = {"id": name, "messages": messages} | ({"kind": kind} if kind else {})
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def test_a_dialogue_is_cut_before_its_longest_answer(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    talk(tmp_path / "talks.jsonl", "头疼", "几天了？", "三天", "先量血压，再来看。", "谢谢", "再见")
    found = make_prompts(data(path, tmp_path / "talks.jsonl"), PromptsConfig())
    prompt = next(p for p in (*found.train, *found.held_out) if p.id == "talk")
    assert [message.content for message in prompt.messages] == ["头疼", "几天了？", "三天"]
    assert prompt.reference == "先量血压，再来看。"


def test_exactly_the_dialogues_that_fine_tuning_holds_out_make_held_out_prompts(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    found = make_prompts(data(path), PromptsConfig())
    held_out = {
        one.messages[0].content
        for one in read_dialogues(path)
        if HELD_OUT.holds_out(dialogue_text(one.messages))
    }
    assert {prompt.messages[0].content for prompt in found.held_out} == held_out
    assert len(found.train) + len(found.held_out) == 24


def test_a_prompt_to_learn_from_is_never_evaluated_on(tmp_path):
    path = tmp_path / "twice.jsonl"
    for index in range(40):  # One question, many answers: some of them are held out.
        talk(path, "感冒了吃什么药？", f"第{index}种说法。", name=f"t{index}")
        talk(path, f"咳嗽{index}天", "多喝水。", name=f"u{index}")
    found = make_prompts(data(path), PromptsConfig())
    train = {prompt.messages for prompt in found.train}
    assert not train & {prompt.messages for prompt in found.held_out}
    assert sum(prompt.messages[0].content == "感冒了吃什么药？" for prompt in found.train) == 1


def test_only_dialogues_of_the_wanted_kinds_or_of_none_are_taken(tmp_path):
    path = tmp_path / "kinds.jsonl"
    for index in range(30):
        for kind in ("real_instruction", "distilled_instruction", None):
            talk(path, f"{kind}{index}", "好。", kind=kind, name=f"{kind}{index}")
    found = make_prompts(data(path), PromptsConfig(kinds=("real_instruction",)))
    texts = {prompt.messages[0].content for prompt in (*found.train, *found.held_out)}
    assert len(texts) == 60 and not any(text.startswith("distilled") for text in texts)


def test_a_limit_keeps_the_same_prompts_when_data_is_added(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    few = make_prompts(data(path), PromptsConfig(limit=5))
    assert len(few.train) == 5
    again = make_prompts(data(path), PromptsConfig(limit=5))
    assert few == again


def test_prompts_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    found = make_prompts(data(path), PromptsConfig()).train
    write_prompts(tmp_path / "prompts.jsonl", found)
    read = list(read_prompts(tmp_path / "prompts.jsonl"))
    assert [(p.id, p.messages, p.reference) for p in read] == [
        (p.id, p.messages, p.reference) for p in found
    ]


def test_data_that_leaves_nothing_to_evaluate_on_is_refused(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    with pytest.raises(ValueError, match="no prompt held out comes of these dialogues"):
        make_prompts(data(path, held_out=HeldOutConfig(share=0.0)), PromptsConfig())


def test_every_dialogue_is_accounted_for_and_each_prompt_says_where_it_stood(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    talk(path, "咳嗽1天了，怎么办？", "再说一遍。", name="again")
    talk(path, "发烧", "去医院。", kind="distilled_instruction", name="other")
    cfg = PromptsConfig(kinds=("real_instruction",), limit=10)
    found = make_prompts(data(path), cfg)
    places = {prompt.extra[READ_FROM] for prompt in (*found.train, *found.held_out)}
    assert places <= {f"mine.jsonl:{number}" for number in range(1, 26)}
    account = found.account
    assert (account.rows, account.rows_used, account.records) == (26, 26, 26)
    assert account.used == {"to train on": 10, "held out": len(found.held_out)}
    assert account.set_aside[OTHER_KIND] == 1 and account.set_aside["over prompts.limit"] > 0
    assert account.left_out in ({REPEATED: 1}, {IN_BOTH: 1})
    account.to_json()  # Where the sums are checked.


def test_an_answer_that_is_not_to_be_learned_is_no_reference(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    marked = tmp_path / "marked.jsonl"
    rows = [
        [("user", "头疼", 1), ("assistant", "先量血压，再来看，不要着急。", 0)],
        [("user", "牙疼", 1), ("assistant", "一直疼吗？", 1), ("user", "一直", 1)]
        + [("assistant", "先拔牙，再吃药，然后休息三天。", 0)],
    ]
    with marked.open("w", encoding="utf-8") as file:
        for name, turns in zip(("no", "yes"), rows, strict=True):
            messages = [{"role": r, "content": c, "weight": w} for r, c, w in turns]
            file.write(json.dumps({"id": name, "messages": messages}) + "\n")
    found = make_prompts(data(path, marked), PromptsConfig())
    (prompt,) = [p for p in (*found.train, *found.held_out) if p.id in ("no", "yes")]
    assert (prompt.id, prompt.reference) == ("yes", "一直疼吗？")
    write_prompts(tmp_path / "prompts.jsonl", [prompt])
    assert list(read_prompts(tmp_path / "prompts.jsonl")) == [prompt]


def ask(path, *texts, **fields):
    """A file of prompts."""
    rows = [
        {"id": str(number), "messages": [{"role": "user", "content": text}], **fields}
        for number, text in enumerate(texts)
    ]
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    return str(path)


def test_prompts_of_files_are_taken_as_they_are_and_no_dialogue_is_read(tmp_path):
    cfg = PromptsConfig(
        files=f"{ask(tmp_path / 'a.jsonl', '头疼', '牙疼')},{ask(tmp_path / 'b.jsonl', '腰疼')}",
        held_out_files=ask(tmp_path / "c.jsonl", "肚子疼", diagnosis="胃炎"),
    )
    found = make_prompts(data(tmp_path / "nowhere.jsonl"), cfg)
    assert [(p.id, p.messages[0].content) for p in found.train] == [
        ("0", "头疼"),
        ("1", "牙疼"),
        ("b:0", "腰疼"),
    ]
    (held_out,) = found.held_out
    assert (held_out.id, held_out.diagnosis) == ("c:0", "胃炎")
    assert held_out.extra[READ_FROM] == "c.jsonl:1"
    assert found.account.used == {"to train on": 3, "held out": 1} and found.account.rows == 4


def test_a_side_without_files_is_made_of_its_dialogues_alone(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    both = make_prompts(data(path), PromptsConfig())
    cfg = PromptsConfig(held_out_files=ask(tmp_path / "own.jsonl", "头疼"))
    found = make_prompts(data(path), cfg)
    assert found.train == both.train and [p.messages[0].content for p in found.held_out] == ["头疼"]
    assert found.account.set_aside[OF_FILES] == len(both.held_out)
    found.account.to_json()


def test_files_that_share_a_prompt_are_refused_by_its_lines(tmp_path):
    cfg = PromptsConfig(
        files=ask(tmp_path / "a.jsonl", "头疼", "牙疼"),
        held_out_files=ask(tmp_path / "b.jsonl", "腰疼", "牙 疼"),
    )
    with pytest.raises(ValueError, match="1 of 2 held-out .* b.jsonl:2 is a.jsonl:2") as error:
        make_prompts(data(tmp_path / "nowhere.jsonl"), cfg)
    assert "\n" not in str(error.value)
    path = tmp_path / "mine.jsonl"
    write_dialogues(path)
    question = make_prompts(data(path), PromptsConfig()).train[0].messages[0].content
    cfg = PromptsConfig(held_out_files=ask(tmp_path / "c.jsonl", question))
    with pytest.raises(ValueError, match="c.jsonl:1 is mine.jsonl:"):
        make_prompts(data(path), cfg)


def ids(prompts):
    return [prompt.id for prompt in prompts]


@pytest.mark.parametrize(
    ("num_held_out", "wanted", "number"),
    [(12, 3, 3), (12, 4, 4), (12, 5, 4), (12, None, 4), (11, None, 3), (3, 64, 1), (2, 64, 1)],
)
def test_at_most_a_third_of_the_held_out_prompts_is_set_aside_for_judgings(
    tmp_path, num_held_out, wanted, number
):
    cfg = PromptsConfig(
        files=ask(tmp_path / "a.jsonl", "头疼"),
        held_out_files=ask(tmp_path / "b.jsonl", *(f"腰疼{day}天" for day in range(num_held_out))),
    )
    none = data(tmp_path / "nowhere.jsonl")
    whole, found = make_prompts(none, cfg), make_prompts(none, cfg, num_judged=wanted)
    assert len(found.judged) == number
    assert sorted(ids([*found.held_out, *found.judged])) == sorted(ids(whole.held_out))
    assert found.train == whole.train and not whole.judged
    assert found.account.set_aside[FOR_JUDGINGS] == number
    assert whole.account.set_aside[FOR_JUDGINGS] == 0
    found.account.to_json()


def test_prompts_for_judgings_come_before_the_limit_and_are_chosen_by_their_content(tmp_path):
    path = tmp_path / "mine.jsonl"
    write_dialogues(path, count=48)
    found = make_prompts(data(path), PromptsConfig(held_out_limit=2), num_judged=3)
    assert (len(found.judged), len(found.held_out)) == (3, 2)
    turned = tmp_path / "turned" / "mine.jsonl"
    turned.parent.mkdir()
    turned.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    again = make_prompts(data(turned), PromptsConfig(held_out_limit=2), num_judged=3)
    for side, other in ((found.judged, again.judged), (found.held_out, again.held_out)):
        assert {one.messages for one in side} == {one.messages for one in other}


def test_a_single_held_out_prompt_cannot_serve_judgings_and_evaluation(tmp_path):
    cfg = PromptsConfig(
        files=ask(tmp_path / "a.jsonl", "头疼"), held_out_files=ask(tmp_path / "b.jsonl", "腰疼")
    )
    none = data(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="there is 1 held-out prompt, and ppo.judging") as error:
        make_prompts(none, cfg, num_judged=8)
    assert "\n" not in str(error.value)
    assert len(make_prompts(none, cfg, num_judged=0).held_out) == 1

"""From files to groups: each answer once, no prompt on both sides, everything dropped counted."""

import dataclasses
import json

import numpy as np
import pytest

from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.chat import templates
from huatuo_jax.data.mixture import HeldOutConfig, dialogue_text
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Comparison, Message, answer, unmarked
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.preferences.data import (
    HELD_OUT_ELSEWHERE,
    NOT_TO_LEARN,
    SAME_TOKENS,
    ComparisonsConfig,
    ComparisonSource,
    open_comparisons,
)
from huatuo_jax.preferences.synthetic import WHOLE_DIALOGUE, mismatched_references
from huatuo_jax.reward.score_file import read_answers
from tests.preferences.tiny import comparisons
from tests.tiny import TOKENIZER, write_rows


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


def _config(*sources, **changed):
    return ComparisonsConfig(
        sources=sources,
        **({"max_length": 128, "row_length": 256, "held_out": HeldOutConfig(share=0.0)} | changed),
    )


def _kway(prompt, texts):
    """All pairs of answers, best first."""
    messages = (Message("user", prompt),)
    return [
        Comparison(f"{prompt}{i}-{j}", messages, answer(texts[i]), answer(texts[j]), "kway")
        for i in range(len(texts))
        for j in range(i + 1, len(texts))
    ]


def test_each_answer_of_a_prompt_stands_in_its_group_once(tokenizer, tmp_path):
    rows = [*_kway("头疼", ["先休息。", "多喝水。", "没事。", "不知道。"]), *comparisons(3)]
    draw = np.random.default_rng(0)
    path = write_rows(tmp_path / "a.jsonl", [rows[i] for i in draw.permutation(len(rows))])
    found = open_comparisons(_config(ComparisonSource(paths=(path,))), tokenizer)
    (group,) = [group for group in found.train if len(group.answers) > 2]
    assert len(group.answers) == 4 and len(group.pairs) == 6
    template = templates.by_name("huatuogpt")
    for comparison in rows[:6]:
        chosen, rejected = (
            np.array(template.render(one, tokenizer).token_ids)
            for one in (comparison.chosen_dialogue, comparison.rejected_dialogue)
        )
        assert any(
            np.array_equal(group.answers[pair.chosen].token_ids, chosen)
            and np.array_equal(group.answers[pair.rejected].token_ids, rejected)
            for pair in group.pairs
        )
    assert not found.held_out and not found.dropped


def test_an_answer_ends_at_the_last_trained_token(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", comparisons(4))
    cfg = _config(ComparisonSource(paths=(path,)))
    for group in open_comparisons(cfg, tokenizer).train:
        for one in group.answers:
            assert one.token_ids[-1] == tokenizer.eos_token_id
    # ChatML adds a line break after the end of a turn, which nobody is trained to say.
    chatml = load_tokenizer(TOKENIZER)
    chatml.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    cfg = dataclasses.replace(cfg, template="chatml")
    for group in open_comparisons(cfg, chatml).train:
        for one in group.answers:
            assert one.token_ids[-1] == chatml.convert_tokens_to_ids("<|im_end|>")


def test_labels_margins_turns_and_lengths_are_kept(tokenizer, tmp_path):
    rows = comparisons(6)
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = open_comparisons(_config(ComparisonSource(paths=(path,))), tokenizer)
    for group, row in zip(found.train, rows, strict=True):
        (pair,) = group.pairs
        assert (pair.p_chosen, pair.margin, pair.source) == (0.9, row.margin, row.source)
        chosen = group.answers[pair.chosen]
        assert chosen.num_characters == len(row.chosen[0].content)
        assert chosen.num_turns == len(row.messages) // 2 + 1


@pytest.mark.parametrize("field", [None, "case"])
def test_no_prompt_or_case_is_on_both_sides(tokenizer, tmp_path, field):
    path = write_rows(tmp_path / "a.jsonl", comparisons(60))
    cfg = _config(
        ComparisonSource(paths=(path,)), held_out=HeldOutConfig(share=0.3), group_field=field
    )
    found = open_comparisons(cfg, tokenizer)
    cases = [{group.case for group in side} for side in (found.train, found.held_out)]
    assert not cases[0] & cases[1]
    assert len(cases[0] | cases[1]) == (60 if field is None else 30)
    assert 5 <= len(found.held_out) <= 35
    # Another file beside it moves no prompt to the other side.
    more = write_rows(tmp_path / "b.jsonl", comparisons(80)[60:])
    both = dataclasses.replace(cfg, sources=(ComparisonSource(paths=(more, path)),))
    assert cases[1] <= {group.case for group in open_comparisons(both, tokenizer).held_out}


def test_what_another_source_holds_out_is_not_trained_and_counted(tokenizer, tmp_path):
    rows = comparisons(10)
    train = write_rows(tmp_path / "a.jsonl", rows)
    test = write_rows(tmp_path / "b.jsonl", rows[7:])
    cfg = _config(
        ComparisonSource(paths=(train,), held_out_by="never"),
        ComparisonSource(paths=(test,), held_out_by="always"),
    )
    found = open_comparisons(cfg, tokenizer)
    assert (len(found.train), len(found.held_out)) == (7, 3)
    assert found.dropped == {HELD_OUT_ELSEWHERE: 3}


def test_what_cannot_be_compared_is_dropped_and_counted(tokenizer, tmp_path):
    same, long = comparisons(2)
    spaces = dataclasses.replace(
        same, messages=(Message("user", "x"),), rejected=answer(same.chosen[0].content + " ")
    )
    long = dataclasses.replace(long, rejected=answer("疼" * 500))
    path = write_rows(tmp_path / "a.jsonl", [same, spaces, long])
    # This template strips the white space around an answer.
    cfg = _config(ComparisonSource(paths=(path,)), template="llama2")
    found = open_comparisons(cfg, tokenizer)
    assert len(found.train) == 1
    assert found.dropped == {"too long": 1, SAME_TOKENS: 1}


def test_nothing_left_and_a_missing_field_are_told_in_one_line(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", comparisons(3))
    with pytest.raises(ValueError, match="no comparison is left to train on .3 read, 3 held out"):
        open_comparisons(_config(ComparisonSource(paths=(path,), held_out_by="always")), tokenizer)
    with pytest.raises(ValueError, match="group_field='hospital': comparison 'c0' has no such"):
        open_comparisons(
            _config(ComparisonSource(paths=(path,)), group_field="hospital"), tokenizer
        )
    with pytest.raises(ValueError, match="row_length=200 must be at least twice max_length=128"):
        _config(ComparisonSource(paths=(path,)), row_length=200)


def test_the_identity_follows_tokens_and_labels_and_not_places(tokenizer, tmp_path):
    rows = comparisons(5)
    first, moved = (
        open_comparisons(
            _config(ComparisonSource(paths=(write_rows(tmp_path / name, rows),))), tokenizer
        ).identity
        for name in ("a.jsonl", "b.jsonl")
    )
    assert first == moved
    rows[2] = dataclasses.replace(rows[2], p_chosen=0.8)
    path = write_rows(tmp_path / "c.jsonl", rows)
    changed = open_comparisons(_config(ComparisonSource(paths=(path,))), tokenizer).identity
    assert changed["train"] != first["train"] and changed["held_out"] == first["held_out"]


def test_sample_dialogues_give_comparisons_that_are_named_for_what_they_are(tokenizer):
    path = SAMPLE_FOLDER / "real_instruction.jsonl"
    dialogues = list(read_dialogues(path))
    made = mismatched_references(dialogues)
    assert made == mismatched_references(dialogues[::-1])
    by_prompt = {one.messages[:-1]: one.messages[-1] for one in dialogues}
    answers = set(by_prompt.values())
    for one in made:
        assert one.chosen == (by_prompt[one.messages],) != one.rejected
        assert one.rejected[0] in answers and one.source == "mismatched_reference"
    cfg = _config(
        ComparisonSource(name="notes", paths=(str(path),), reads="dialogues"),
        max_length=512,
        row_length=1024,
    )
    sources = {p.source for g in open_comparisons(cfg, tokenizer).train for p in g.pairs}
    assert sources == {"mismatched_reference:notes"}


def test_spoiled_answers_are_held_out_where_fine_tuning_holds_out_their_dialogue(tokenizer):
    path = SAMPLE_FOLDER / "real_conversation.jsonl"
    held_out = HeldOutConfig(share=0.3)
    cfg = _config(
        ComparisonSource(paths=(str(path),), reads="dialogues_to_spoil"),
        max_length=512,
        row_length=2048,
        held_out=held_out,
        group_field=WHOLE_DIALOGUE,
    )
    found = open_comparisons(cfg, tokenizer)
    wanted = {dialogue_text(one.messages) for one in read_dialogues(path)}
    wanted = {text for text in wanted if held_out.holds_out(text)}
    assert {group.case for group in found.held_out} == wanted
    assert not wanted & {group.case for group in found.train}
    assert all(len(group.answers) == 5 and len(group.pairs) == 4 for group in found.train)


def _prompt(num_exchanges):
    """A consultation of so many exchanges that are over, and a last question."""
    messages = []
    for index in range(num_exchanges):
        messages += [Message("user", f"第{index}天还咳嗽。"), *answer("发烧吗？")]
    return (*messages, Message("user", "没有。"))


@pytest.mark.parametrize("template_name", ["huatuogpt", "llama2", "baichuan"])
@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_both_answers_of_a_pair_stand_behind_the_same_prompt_however_it_is_cut(
    tokenizer, tmp_path, template_name, longer
):
    prompt, long, short = _prompt(4), answer("先多喝水，注意休息。" * 8), answer("没事。")
    chosen, rejected = (long, short) if longer == "chosen" else (short, long)
    pair = Comparison("long", prompt, chosen, rejected, "test")
    third = Comparison("third", prompt, long, answer("多喝水。"), "test")
    path = write_rows(tmp_path / "a.jsonl", [pair, third])
    template = templates.by_name(template_name)
    # Room for the longer answer behind the last two exchanges.
    limit = len(template.render([*prompt[4:], *long], tokenizer).token_ids) + 1
    cfg = _config(
        ComparisonSource(paths=(path,)),
        template=template_name,
        max_length=limit,
        row_length=3 * limit,
    )
    ((group,), dropped) = (
        (found := open_comparisons(cfg, tokenizer)).train,
        found.dropped,
    )
    assert not dropped and len(group.pairs) == 2 and len(group.answers) == 3
    expected = template.prompt(prompt[4:], tokenizer)
    for one in group.answers:
        assert one.token_ids[: len(expected)].tolist() == expected
        assert int(np.argmax(one.is_answer)) == len(expected)
    # Each by itself would keep another history: the short one fits behind more of it.
    alone = len(template.render([*prompt[2:], *short], tokenizer).token_ids)
    assert alone <= limit


def test_a_pair_whose_answer_fits_behind_no_prompt_is_dropped_and_cuts_nothing(tokenizer, tmp_path):
    prompt = _prompt(2)
    rows = [
        Comparison("long", prompt, answer("疼" * 500), answer("没事。"), "test"),
        Comparison("fits", prompt, answer("多喝水。"), answer("没事。"), "test"),
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    cfg = _config(ComparisonSource(paths=(path,)), max_length=256, row_length=512)
    found = open_comparisons(cfg, tokenizer)
    (group,) = found.train
    assert found.dropped == {"too long": 1} and len(group.answers) == 2
    whole = templates.by_name("huatuogpt").prompt(prompt, tokenizer)
    assert all(one.token_ids[: len(whole)].tolist() == whole for one in group.answers)
    cfg = _config(ComparisonSource(paths=(path,)), truncation="drop_row", max_length=len(whole))
    with pytest.raises(ValueError, match="no comparison is left .* {'too long': 2}"):
        open_comparisons(cfg, tokenizer)


def test_what_is_not_to_be_trained_is_never_chosen_but_compared_and_scored_whole(
    tokenizer, tmp_path
):
    rows = [
        {
            "id": f"d{number}",
            "messages": [
                {"role": "user", "content": f"头疼{number}天了"},
                {"role": "assistant", "content": f"第{number}个说法。", "weight": number % 2},
            ],
        }
        for number in range(8)
    ]
    path = tmp_path / "marked.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for reads in ("dialogues", "dialogues_to_spoil"):
        source = ComparisonSource(paths=(str(path),), reads=reads)
        found = open_comparisons(_config(source), tokenizer)
        assert found.dropped[NOT_TO_LEARN] == 4 and len(found.train) == 4
    # A mark takes no token off what is scored.
    marked = (Message("user", "头疼"), Message("assistant", "休息。", trained=False))
    row = {"id": "m", "messages": rows[0]["messages"]}
    path.write_text(json.dumps(row), encoding="utf-8")
    (answered,) = read_answers(str(path), _config(source), tokenizer)
    marked = (Message("user", "头疼0天了"), Message("assistant", "第0个说法。", trained=False))
    rendered = templates.by_name("huatuogpt").render(unmarked(marked), tokenizer)
    assert answered.token_ids.tolist() == rendered.token_ids
    assert answered.is_answer[-1]

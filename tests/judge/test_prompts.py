import dataclasses

import pytest

from huatuo_jax.data.records import Message, Prompt
from huatuo_jax.judge.openai import read_judge_prompt

PROMPT = Prompt(
    id="p",
    messages=(
        Message("system", "你是医生。"),
        Message("user", "胃疼。"),
        Message("assistant", "多久了？"),
        Message("user", "两天。"),
    ),
    source="invented",
    reference="先做胃镜。",
    diagnosis="胃炎",
)
SCORE = "[system]\n你是评委。\n[user]\n{{dialogue}}|{{reference}}|{{answer}}|{{low}}|{{high}}\n"


def template(tmp_path, text, protocol="score"):
    path = tmp_path / "template.txt"
    path.write_text(text, encoding="utf-8")
    return read_judge_prompt(protocol, path)


def test_every_place_is_filled(tmp_path):
    system, user = template(tmp_path, SCORE).render(PROMPT, ["多休息。"], low=1, high=9)
    assert system == {"role": "system", "content": "你是评委。"}
    assert user == {
        "role": "user",
        "content": "系统：你是医生。\n患者：胃疼。\n医生：多久了？\n患者：两天。|"
        "医生当时的回答：先做胃镜。\n医生的诊断：胃炎|多休息。|1|9",
    }


def test_what_looks_like_a_place_in_a_text_stays_text(tmp_path):
    texts = ["{{reference}} {{low}} \\1 {0} %s"]
    user = template(tmp_path, SCORE).render(PROMPT, texts, low=1, high=5)[-1]
    assert user["content"].endswith("|{{reference}} {{low}} \\1 {0} %s|1|5")


def test_the_shipped_templates_show_all_texts_between_marks_that_depend_on_them():
    marks = set()
    for protocol, texts in (
        ("score", ["甲。"]),
        ("score", ["乙。"]),
        ("pairwise", ["甲。", "乙。"]),
    ):
        prompt = read_judge_prompt(protocol)
        system, user = prompt.render(PROMPT, texts, low=1, high=5)
        for text in ("胃疼。", "两天。", "先做胃镜。", "胃炎", *texts):
            assert user["content"].count(text) == 1
        assert "{{" not in system["content"] + user["content"] and "JSON" in user["content"]
        marks.add(user["content"].split("<对话 ")[1][:8])
    assert len(marks) == 3


def test_a_pair_is_shown_in_the_order_given():
    prompt = read_judge_prompt("pairwise")
    for texts in (["甲。", "乙。"], ["乙。", "甲。"]):
        content = prompt.render(PROMPT, texts, low=1, high=5)[-1]["content"]
        assert content.index(texts[0]) < content.index(texts[1])


def test_a_prompt_without_a_doctors_word_is_refused_unless_asked_for(tmp_path):
    bare = dataclasses.replace(PROMPT, reference=" ", diagnosis=None)
    prompt = template(tmp_path, SCORE)
    with pytest.raises(ValueError, match="prompt 'p' has neither a reference nor a diagnosis"):
        prompt.render(bare, ["甲。"], low=1, high=5)
    content = prompt.render(bare, ["甲。"], low=1, high=5, require_reference=False)[-1]["content"]
    assert "没有参考" in content


def test_the_hash_is_that_of_the_text(tmp_path):
    first = template(tmp_path, SCORE).hash
    assert first == template(tmp_path, SCORE).hash != template(tmp_path, SCORE + "。").hash
    assert len({read_judge_prompt(p).hash for p in ("score", "pairwise")} | {first}) == 3


def test_a_broken_character_is_sent_as_a_question_mark(tmp_path):
    content = template(tmp_path, SCORE).render(PROMPT, ["好\ud800。"], low=1, high=5)[-1]["content"]
    assert content.encode("utf-8") and "好?。" in content


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (SCORE.replace("{{answer}}", ""), r"lacks \{\{answer\}\}"),
        (SCORE.replace("{{low}}", "{{lowest}}"), r"lacks \{\{low\}\}"),
        (SCORE + "{{first}}", r"has unknown \{\{first\}\}"),
        ("{{answer}}", r"should be a line \[system\]"),
        ("[user]\n", r"should be a line \[system\]"),
        ("[user]\nx\n[system]\ny\n", r"should be a line \[system\]"),
        ("hello\n" + SCORE, r"should be a line \[system\]"),
    ],
)
def test_a_template_that_cannot_be_is_refused(tmp_path, text, why):
    with pytest.raises(ValueError, match=why):
        template(tmp_path, text)


def test_a_template_without_a_system_part_sends_one_message(tmp_path):
    text = SCORE.split("\n", 2)[2]
    messages = template(tmp_path, text).render(PROMPT, ["甲。"], low=1, high=5)
    assert [message["role"] for message in messages] == ["user"]


def test_a_missing_or_undecodable_template_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        read_judge_prompt("score", tmp_path / "none.txt")
    path = tmp_path / "gbk.txt"
    path.write_bytes(SCORE.encode("gb18030"))
    with pytest.raises(ValueError, match="should be UTF-8"):
        read_judge_prompt("score", path)

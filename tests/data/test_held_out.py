import numpy as np
import pytest

from huatuo_jax.data.mixture import HeldOutConfig, dialogue_text, normalized
from huatuo_jax.data.records import Message


def test_adding_dialogues_moves_none_across_the_split():
    config = HeldOutConfig(share=0.1)
    texts = [f"患者第{number}次来诊，咳嗽{number}天。" for number in range(2000)]
    before = {text: config.holds_out(text) for text in texts[:1000]}
    after = {text: config.holds_out(text) for text in reversed(texts)}
    assert all(after[text] == held for text, held in before.items())
    assert sum(before.values()) == pytest.approx(100, abs=5 * np.sqrt(90))


def test_a_larger_share_keeps_what_a_smaller_one_held_out():
    texts = [f"text {number}" for number in range(500)]
    small, large = HeldOutConfig(share=0.1), HeldOutConfig(share=0.3)
    assert {t for t in texts if small.holds_out(t)} < {t for t in texts if large.holds_out(t)}


def test_another_salt_holds_out_others():
    texts = [f"text {number}" for number in range(500)]
    first = {t for t in texts if HeldOutConfig(share=0.2, salt="a").holds_out(t)}
    second = {t for t in texts if HeldOutConfig(share=0.2, salt="b").holds_out(t)}
    # Independent draws share 0.2 x 0.2 of the texts.
    assert len(first & second) == pytest.approx(20, abs=15)


def test_a_share_of_zero_holds_out_nothing():
    assert not any(HeldOutConfig(share=0.0).holds_out(str(number)) for number in range(1000))


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="held_out.share"):
        HeldOutConfig(share=share)


def test_copies_that_differ_in_form_only_have_one_text():
    assert normalized("ＣＴ 检查\u3000正常。\n") == normalized("ct检查正常。")


def test_the_system_text_and_the_spacing_do_not_make_another_dialogue():
    spoken = [Message("user", "头痛三天了"), Message("assistant", "请测一下血压。")]
    spaced = [Message("user", "头痛 三天了 "), Message("assistant", "请测一下血压。\n")]
    assert dialogue_text([Message("system", "你是医生。"), *spoken]) == dialogue_text(spaced)


def test_where_a_turn_ends_makes_another_dialogue():
    first = [Message("user", "头痛"), Message("assistant", "三天了")]
    second = [Message("user", "头痛三"), Message("assistant", "天了")]
    assert dialogue_text(first) != dialogue_text(second)

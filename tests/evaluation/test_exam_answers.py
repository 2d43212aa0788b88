import pytest

from huatuo_jax.evaluation.exam_answers import extract_answer
from tests.evaluation import released_extractors
from tests.evaluation.tricky_replies import DISEASES, SEVERAL, SINGLE, YES_NO, YES_NO_MAYBE


def letters(found):
    return "" if found is None else "".join(sorted(found))


@pytest.mark.parametrize(("options", "reply", "chosen"), SINGLE)
def test_tricky_replies_to_single_choice_are_read_right(options, reply, chosen):
    assert letters(extract_answer(reply, options, several=False)) == chosen


@pytest.mark.parametrize(("options", "reply", "chosen"), SEVERAL)
def test_tricky_replies_to_multiple_choice_are_read_right(options, reply, chosen):
    assert letters(extract_answer(reply, options, several=True)) == chosen


@pytest.mark.parametrize(("reply", "chosen"), YES_NO_MAYBE)
def test_yes_no_and_maybe_are_read_right(reply, chosen):
    assert extract_answer(reply, YES_NO, several=False) == (frozenset({chosen}) if chosen else None)


def test_the_table_has_hundreds_of_replies_and_none_twice():
    cases = [(str(options), reply) for options, reply, _ in SINGLE]
    assert len(set(cases)) == len(cases) > 200 and len(SEVERAL) > 50


@pytest.mark.parametrize(
    ("extractor", "reply", "several", "right", "given"),
    [
        # The first statement wins, and with none all letters of the text are the answer.
        ("cmb", "答案是A。更正：答案是B。", False, "B", "A"),
        ("cmb", "<think>可能答案是A。</think>答案是C。", False, "C", "A"),
        ("cmb", "A错误，C错误，因此选B。", False, "B", "A"),
        ("cmb", "答案不是A，而是B。", False, "B", "A"),
        ("cmb", "答案是D、B。", True, "BD", "DB"),
        ("cmb", "答案是Ｂ。", False, "B", ""),
        ("cmb", "CT和MRI均可，选CD。", True, "CD", "CCD"),
        # Letters count in ascending order only, and a reply without an answer counts as B.
        ("huatuogpt2", "答案是D、B。", True, "BD", "D"),
        ("huatuogpt2", "A错误，C错误，因此选B。", False, "B", "A"),
        ("huatuogpt2", "答案是A。更正：答案是B。", False, "B", "A"),
        ("huatuogpt2", "我不确定。", False, "", "B"),
        ("huatuogpt2", "答案是", False, "", "B"),
        # The first and the last find are both kept; there always is one.
        ("huatuogpt_o1", "A错误，C错误，因此选B。", False, "B", "A or B"),
        ("huatuogpt_o1", "答案是A。更正：答案是B。", False, "B", "A or B"),
        ("huatuogpt_o1", "答案是B。A错误。", False, "B", "B or A"),
        ("huatuogpt_o1", "无法判断，请咨询医生。", False, "", "E"),
        # Every capital letter counts.
        ("opencompass_multiple", "本题考查CT检查的适应证。答案是B。", True, "B", "BCT"),
        ("opencompass_multiple", "A错误，C错误，因此选B。", True, "B", "ABC"),
        ("opencompass_multiple", "答案是Ｂ。", True, "B", "Ｂ"),
        ("opencompass_first", "答案是A。更正：答案是B。", False, "B", "A"),
        ("opencompass_first", "<think>可能答案是A。</think>答案是C。", False, "C", "A"),
        ("opencompass_first", "不选A，选B。", False, "B", "A"),
        # Every option that is mentioned counts.
        ("cmexam", "本题考查CT检查的适应证。答案是B。", False, "B", "BC"),
        ("cmexam", "A错误，C错误，因此选B。", False, "B", "ABC"),
        ("cmexam", "不是肺炎，考虑胃溃疡。", False, "C", "AC"),
    ],
)
def test_released_extractors_fail_where_ours_is_right(extractor, reply, several, right, given):
    released = getattr(released_extractors, extractor)
    assert released(reply, DISEASES, several) == given != right
    assert letters(extract_answer(reply, DISEASES, several=several)) == right


@pytest.mark.parametrize("released", released_extractors.EXTRACTORS)
def test_no_released_extractor_reads_two_thirds_of_the_tricky_replies(released):
    cases = [(*case, False) for case in SINGLE] + [(*case, True) for case in SEVERAL]
    right = [released(reply, options, several) == key for options, reply, key, several in cases]
    assert sum(right) < 2 / 3 * len(right)


@pytest.mark.parametrize(
    "reply",
    [
        *("\n" * 20_000, " " * 20_000, "(" * 20_000, "x" * 20_000, "A" * 20_000),
        *(
            "A B " * 1_500,
            "A、" * 1_500,
            "答案是" * 5_000,
            "答案" + "应该" * 5_000,
            "急性阑尾炎" * 3_000,
        ),
        *("answer " + "is " * 5_000, "if " * 5_000, "not " * 5_000, "\\boxed{" * 3_000),
        *("<think>" * 1_000, "<answer>" * 1_000, "不对，" * 5_000, "~" * 20_000),
    ],
)
def test_replies_that_never_end_are_read_in_a_moment(reply):
    # A quadratic or exponential pattern would take minutes here.
    for end in ("", "答案是B。"):
        extract_answer(reply + end, DISEASES, several=True)

import pytest

from huatuo_jax.data.formats.dialogues import (
    CASE_FORMATS,
    EXAM_FORMATS,
    Terms,
    options_from_text,
    recognise,
)
from huatuo_jax.data.formats.turns import RowProblem
from huatuo_jax.data.records import Case, ExamQuestion

TERMS = Terms(file_name="exam")
OPTIONS = {"A": "心", "B": "肝", "C": "脾 B 型"}
ASKED = {"question": "下列哪个是器官？"}


def convert(row, formats=EXAM_FORMATS):
    return recognise(row, formats).convert(row, TERMS).records


@pytest.mark.parametrize(
    "row",
    [
        {**ASKED, "options": OPTIONS, "answer": "B"},
        {**ASKED, "options": {**OPTIONS, "D": None}, "answer": "肝", "answer_idx": "B"},
        {**ASKED, "options": list(OPTIONS.values()), "answer": "(B)"},
        {**ASKED, **OPTIONS, "answer": " B "},
        {**ASKED, **OPTIONS, "D": "", "E": None, "answer": "B"},
        {"Question": ASKED["question"], **OPTIONS, "Answer": "B"},
        {**ASKED, "option": "(A) 心\n(B) 肝\n(C) 脾 B 型", "answer": "(B)"},
        {**ASKED, "Options": "A 心\nB 肝\nC 脾 B 型", "Answer": "B"},
        {**ASKED, "options": "A. 心\nB、肝\nC：脾 B 型\n", "answer": "B"},
    ],
)
def test_exam_questions_are_read_in_their_common_shapes(row):
    (question,) = convert(row)
    assert isinstance(question, ExamQuestion) and question.extra == {}
    assert (question.question, dict(question.options), question.answer) == (
        *(ASKED["question"], OPTIONS, "B"),
    )


def test_several_right_answers_are_letters_in_order():
    for value in ("CA", "(AC)", "A, C", "A、C"):
        (question,) = convert({**ASKED, "options": OPTIONS, "answer": value, "explanation": " "})
        assert question.answer == "AC" and question.explanation is None


def test_options_go_on_over_lines_that_do_not_begin_the_next_option():
    assert options_from_text("A 心\n主血脉\nC 不是下一项\nB 肝") == {
        "A": "心\n主血脉\nC 不是下一项",
        "B": "肝",
    }


def test_a_letter_alone_on_its_line_is_an_option_without_text():
    assert options_from_text("A 心\n B \nC\n(D)\nE 肝") == {
        **{"A": "心", "B": "", "C": "", "D": "", "E": "肝"}
    }
    (question,) = convert({**ASKED, "options": "A 心\nB 肝\nC 脾 B 型\nD\nE", "answer": "B"})
    assert dict(question.options) == OPTIONS


def test_a_line_after_the_last_letter_continues_its_option():
    letters = "ABCDEFGHIJ"
    given = "\n".join(f"{letter} 药" for letter in letters) + "\nA 心"
    assert options_from_text(given) == {**dict.fromkeys(letters, "药"), "J": "药\nA 心"}


def test_our_own_exam_and_case_lines_come_back_equal():
    written = ExamQuestion("e", "哪些？", OPTIONS, "AB", "exam", "因为", {"year": 3})
    assert convert(written.to_json()) == (written,)
    case = Case("k", "咳嗽", "感冒", "儿科", "clinic", {"age": 3})
    assert convert(case.to_json(), CASE_FORMATS) == (case,)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "E"}, "the answer 'E' is not letters out of ABC"),
        ({"answer": 1}, "the answer is int"),
        ({"options": {"A": "心"}}, "not at least two texts"),
        ({"options": {"A": "心", "B": 3}}, "not at least two texts"),
        ({"options": {"1": "心", "2": "肝"}}, "lettered 1, 2"),
        ({"options": "心 肝"}, "do not begin with A"),
        ({"options": 3}, "the options are int"),
        ({"question": ""}, "question is empty"),
        ({"explanation": 3}, "explanation is int"),
    ],
)
def test_broken_exam_questions_say_what_is_wrong(change, said):
    with pytest.raises(RowProblem, match=said):
        convert({**ASKED, "options": OPTIONS, "answer": "A", **change})


def test_cases_are_read_with_either_spelling_of_the_department():
    row = {"id": 5, "medical_case": "咳嗽", "doctor_diagnosis": "感冒", "note": "x"}
    for key in ("department", "Department"):
        (case,) = convert({**row, key: "儿科"}, CASE_FORMATS)
        assert case == Case("5", "咳嗽", "感冒", "儿科", "exam", {"note": "x"})
    assert convert({**row, "department": ""}, CASE_FORMATS)[0].department is None
    with pytest.raises(RowProblem, match="medical_case is empty"):
        convert({**row, "medical_case": " "}, CASE_FORMATS)

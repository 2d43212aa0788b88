"""The published rules of verifiers, each edge case in a line of a table."""

import pytest

from huatuo_jax.evaluation.choice_reward import multiple_choice
from huatuo_jax.reward_functions.forms import final_part, medical_o1_answer, think_answer
from huatuo_jax.reward_functions.matching import is_correct
from huatuo_jax.reward_functions.verifiers import medical_o1, think_and_answer


def o1(thinking, answer):
    return f"## Thinking\n\n{thinking}\n\n## Final Response\n\n{answer}"


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (o1("It burns after meals.", "Gastritis."), 1.0),
        (o1("It burns after meals.", "gastritis"), 1.0),
        (o1("It burns after meals.", "Appendicitis."), 0.1),
        # Right in the thinking alone: the answer after the marker counts.
        (o1("Gastritis", "Appendicitis."), 0.1),
        (o1("Gastritis", ""), 0.1),
        # The form is wrong though the content is right.
        ("Gastritis.", 0.0),
        ("", 0.0),
        ("## Final Response\n\nGastritis.", 0.0),
        ("## Thinking\n\nGastritis.", 0.0),
        ("## Thinking\n\nIt burns.\n\n## Final Response\nGastritis.", 0.0),
        (o1("It burns.", "Gastritis.") + "\n\n## Final Response\n\nGastritis.", 0.0),
        ("## Thinking\n\n" + o1("It burns.", "Gastritis."), 0.0),
        ("## Final Response\n\nGastritis.\n\n## Thinking\n\nIt burns.", 0.0),
        # Cut off before the final response.
        ("## Thinking\n\nIt burns after me", 0.0),
    ],
)
def test_medical_o1_gives_1_for_right_a_tenth_for_wrong_and_0_for_another_form(response, reward):
    assert medical_o1([None], [response], reference=["Gastritis"]) == [reward]


def test_the_rewards_of_a_verifier_are_its_settings():
    responses = [o1("", "A"), o1("", "B"), "A"]
    settings = {"correct": 2.0, "wrong": -0.5, "invalid": -1.0}
    assert medical_o1([None] * 3, responses, reference=["A"] * 3, **settings) == [2.0, -0.5, -1.0]


@pytest.mark.parametrize("reference", [None, "", "  ", []])
def test_a_prompt_without_a_reference_has_no_reward(reference):
    assert medical_o1([None], [o1("", "A")], reference=[reference]) == [None]
    assert think_and_answer(
        [None], ["<think></think><answer>A</answer>"], reference=[reference]
    ) == [None]


def test_any_of_several_references_is_right():
    assert medical_o1([None], [o1("", "感冒。")], reference=[["上呼吸道感染", "感冒"]]) == [1.0]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>a</think>\n<answer>B</answer>", "B"),
        ("a</think><answer>B</answer>", "B"),  # The prompt ended with <think>.
        ("<think>a</think><answer>A</answer> no: <answer>B</answer>", "B"),
        ("<think><answer>A</answer></think>", None),
        ("<think><answer>A</answer></think><answer>B</answer>", "B"),
        ("<answer>B</answer>", None),
        ("<think>a<answer>B</answer>", None),
        ("<think>a</think>B", None),
        ("<think>a</think><answer>B", None),
        ("<think>a<think>b</think><answer>B</answer>", None),
        ("<think>a</think><think>b</think><answer>B</answer>", None),
        ("<think>a</think><answer>A<answer>B</answer>", "B"),
        ("", None),
    ],
)
def test_the_answer_of_a_thought_is_the_last_tag_behind_it(response, answer):
    assert think_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "part"),
    [
        (o1("a", "b"), "b"),
        ("<think>a</think>b", "b"),
        ("b", "b"),
        ("<think>a", ""),
        ("## Thinking\n\na", ""),
    ],
)
def test_the_final_part_leaves_the_thinking_out(response, part):
    assert final_part(response) == part
    assert medical_o1_answer(o1("a", "b\n")) == "b\n"


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("１２０ mmHg", "120 mmHg", True),
        ("The dose is 1,200 mg.", "1200 mg", True),
        ("12.50", "12.5", True),
        ("About 12 at first, then 15.", "15", True),
        ("15, at first 12", "15", False),
        ("50 g", "50 mg", False),
        ("50 MG", "50 mg", True),
        ("50", "50 mg", True),
        ("血压140/90mmHg", "140/90 mmHg", True),
        ("血压90/140mmHg", "140/90 mmHg", False),
        ("-3", "3", False),
        ("−3", "-3", True),
        ("10-20", "20", True),
        ("1e3", "1000", True),
        (".5", "0.5", True),
        ("5%", "5", True),
        ("5%", "0.05", False),
        ("no number", "5", False),
        ("0.0000001", "0", False),
        ("Type 2 diabetes", "type 2 diabetes", True),
        ("Type 1 diabetes", "type 2 diabetes", False),
        ("2", "type 2 diabetes", False),
        ("“胃炎”。", "胃炎", False),  # Quotation marks of this kind are part of the text.
        ("**胃炎**。", "胃炎", True),
        ("胃炎和胃溃疡", "胃炎", False),
    ],
)
def test_answers_match_as_numbers_where_the_reference_is_numbers_and_else_as_texts(
    answer, reference, right
):
    assert is_correct(answer, [reference]) is right


@pytest.mark.parametrize(
    ("settings", "reference", "message"),
    [
        ({"match": "near"}, "5", "match='near' must be one of"),
        ({"match": "numeric"}, "five", "holds no number"),
        ({"tolerance": 1.0}, "5", "tolerance=1.0 must be"),
        ({}, "...", "must hold a text"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(settings, reference, message):
    with pytest.raises(ValueError, match=message):
        is_correct("5", [reference], **settings)


def test_a_tolerance_is_relative():
    assert is_correct("101", ["100"], tolerance=0.01)
    assert not is_correct("102", ["100"], tolerance=0.01)


OPTIONS = {"A": "胃炎", "B": "阑尾炎", "C": "感冒"}


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("答案是B。", "B", 1.0),
        ("<think>可能是A。</think>答案是B。", "B", 1.0),
        ("<think>答案是B。</think>", "B", 0.0),
        ("<think>A</think><answer>B</answer>", "B", 1.0),
        ("<think>A</think><answer>A</answer>不，<answer>B</answer>", "B", 1.0),
        ("答案是C、A。", "AC", 1.0),
        ("答案是A。", "AC", 0.0),
        ("答案是A、B、C。", "AC", 0.0),
        ("答案是A、C。", ["C", "A"], 1.0),
        ("答案是A。更正：答案是B。", "B", 1.0),
        ("我不确定。", "B", 0.0),
        ("", "B", 0.0),
        ("阑尾炎", "B", 1.0),
    ],
)
def test_a_choice_is_read_as_the_evaluation_reads_it(response, answer, reward):
    assert multiple_choice([None], [response], options=[OPTIONS], answer=[answer]) == [reward]


def test_a_choice_without_thinking_is_wrong_where_it_is_required():
    responses = ["答案是B。", "<think>A?</think><answer>B</answer>"]
    found = multiple_choice(
        [None] * 2, responses, options=[OPTIONS] * 2, answer=["B"] * 2, needs_thinking=True
    )
    assert found == [0.0, 1.0]


def test_labels_may_be_words():
    options = {"yes": "yes", "no": "no", "maybe": "maybe"}
    assert multiple_choice([None], ["no"], options=[options], answer=["no"]) == [1.0]


def test_a_prompt_without_options_has_no_reward_and_a_key_outside_of_them_is_refused():
    assert multiple_choice([None], ["B"], options=[None], answer=["B"]) == [None]
    assert multiple_choice([None], ["B"], options=[OPTIONS], answer=[None]) == [None]
    with pytest.raises(ValueError, match="answer 'D' must be among the options"):
        multiple_choice([None], ["B"], options=[OPTIONS], answer=["D"])

import json

import pytest

from huatuo_jax.evaluation.exam_answers import extract_answer
from huatuo_jax.evaluation.exam_questions import Question, draw_examples
from huatuo_jax.evaluation.exam_sets import (
    CEVAL_SUBJECTS,
    CMMLU_SUBJECTS,
    MMLU_SUBJECTS,
    read_apollo,
    read_cmb,
    read_cmexam,
    read_medmcqa,
    read_medqa,
    read_pubmedqa,
    read_subject_files,
    read_subject_folder,
)

CMB = {
    "id": 1,
    "exam_type": "医师考试",
    "exam_class": "规培结业",
    "exam_subject": "内科",
    "question": "主血脉的是",
    "answer": "A",
    "question_type": "单项选择题",
    "option": {"A": "心", "B": "肝", "C": "脾", "D": "", "E": ""},
}
MEDMCQA = {
    **{"id": "m1", "question": "Which?", "opa": "one", "opb": "two", "opc": "three", "opd": "four"},
    **{"subject_name": "Anatomy", "choice_type": "multi", "exp": None},
}
PUBMEDQA = {"QUESTION": "Does it?", "CONTEXTS": ["First.", "Second."], "final_decision": "yes"}


@pytest.fixture
def write(tmp_path):
    def write(name, value, *, lines=False):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(value, str):
            path.write_text(value, encoding="utf-8")
        elif lines:
            path.write_text("\n".join(map(json.dumps, value)), encoding="utf-8")
        else:
            path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
        return path

    return write


def refused(call):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_cmb_keeps_options_of_one_character_and_drops_empty_ones(write):
    found = read_cmb(write("val.json", [CMB]))
    (question,) = found.questions
    assert dict(question.options) == {"A": "心", "B": "肝", "C": "脾"}
    assert (question.category, question.subject, question.kind) == (
        *("医师考试", "规培结业", "single"),
    )
    assert question.answer == {"A"} and found.num_empty_options == 2 and not found.excluded


def test_cmb_test_questions_get_their_answers_from_the_second_file(write):
    unanswered = {key: value for key, value in CMB.items() if key != "answer"}
    others = {"question_type": "多项选择题", "exam_type": "医师考试", "exam_class": "规培结业"}
    questions = write("test.json", [{**unanswered, **others}, {**unanswered, "id": 2}])
    answers = [{"id": 1, "answer": "CA", **others}, {"id": 9, "answer": "B"}]
    for lines in (False, True):
        found = read_cmb(questions, answers=write("answers.json", answers, lines=lines))
        assert found.questions[0].answer == {"A", "C"} and found.questions[0].kind == "multiple"
        assert found.reasons() == {"no answer": 1, "answer without a question": 1}
        assert [(one.row, one.id) for one in found.excluded] == [(2, "2"), (2, "9")]


def test_rows_that_are_no_questions_are_excluded_by_name(write):
    rows = [
        CMB,
        {**CMB, "question": "另一题"},
        {**CMB, "id": 2, "answer": "F"},
        {**CMB, "id": 3, "answer": "D"},
        {**CMB, "id": 4, "answer": ""},
        {**CMB, "id": 5, "answer": "AB"},
        {**CMB, "id": 6, "question": " "},
        {**CMB, "id": 7, "option": {"A": "心"}},
        {**CMB, "id": 8, "option": {"A": "心", "甲": "肝"}},
        {**CMB, "id": 9, "option": 5},
        {**CMB, "id": 10, "question": 5},
        {**CMB, "id": 11, "question_type": "问答题"},
        {**CMB, "id": 12, "answer": "AA"},
        {key: value for key, value in CMB.items() if key != "question"},
        {**CMB, "id": 13, "question_type": "多项选择题"},
    ]
    found = read_cmb(write("val.json", rows))
    assert [question.id for question in found.questions] == ["1", "13"]
    assert [(one.row, one.reason) for one in found.excluded] == [
        (2, "duplicate id"),
        (3, "answer key outside the options"),
        (4, "the key's option is empty"),
        (5, "no answer"),
        (6, "single choice with several right answers"),
        (7, "empty question"),
        (8, "fewer than two options"),
        (9, "options are not readable"),
        (10, "options are not readable"),
        (11, "field is not text"),
        (12, "unknown question type"),
        (13, "answer key outside the options"),
        (14, "missing field"),
    ]
    assert found.num_rows == len(found.questions) + len(found.excluded) == 15
    assert "2 questions of 15 rows; excluded: 1 duplicate id, 2 answer key" in found.describe()


def test_files_in_another_layout_are_refused_in_one_line(write, tmp_path):
    message = refused(lambda: read_cmb(write("a.json", [{"prompt": "x", "completion": "y"}])))
    assert "a.json" in message and "'prompt', 'completion'" in message and "exam_class" in message
    assert "not JSON" in refused(lambda: read_cmb(write("b.json", "[1, 2")))
    assert "b.jsonl:2: not a line of JSON" in refused(
        lambda: read_apollo(write("b.jsonl", '{"question": "x"}\n{broken'))
    )
    assert "first row has 5" in refused(lambda: read_cmb(write("c.json", [CMB, 5])))
    assert "there is no such file" in refused(lambda: read_cmb(tmp_path / "none.json"))
    assert "needed are Question" in refused(lambda: read_cmexam(write("d.csv", "a,b\n1,2\n")))
    assert "has no rows" in refused(
        lambda: read_cmexam(write("e.csv", "Question,Options,Answer\n"))
    )
    latin = tmp_path / "f.csv"
    latin.write_bytes("Question,Options,Answer\n题,A 心,A\n".encode("gb18030"))
    assert "not UTF-8 at byte" in refused(lambda: read_cmexam(latin))
    assert "no question of cmb can be used; row 1: no answer" in refused(
        lambda: read_cmb(write("g.json", [{**CMB, "answer": None}]))
    )


def test_answers_given_twice_and_differently_are_refused(write):
    questions = write("test.json", [CMB])
    answers = write("answers.json", [{"id": 1, "answer": "A"}, {"id": 1, "answer": "B"}])
    message = refused(lambda: read_cmb(questions, answers=answers))
    assert "row 2: id 1 has another answer in row 1" in message
    answers = write("answers.json", [{"id": 1, "answer": "A", "exam_class": "护师"}])
    message = refused(lambda: read_cmb(questions, answers=answers))
    assert "disagree" in message and "护师" in message


def test_cmexam_options_are_lines_with_a_letter(write):
    table = (
        "Question,Options,Answer,Explanation,Medical Discipline\n"
        '哪个,"A 心\nB 肝 脏\nC\nD 肺",AB,因为,基础医学\n'
        '哪个,"心 肝",A,,\n'
        '另一,"A 心\nB 肝",,,\n'
        '再一,"A 心\nB 肝",A,,,多\n'
    )
    found = read_cmexam(write("test.csv", table))
    (question,) = found.questions
    assert dict(question.options) == {"A": "心", "B": "肝 脏", "D": "肺"}
    assert (question.kind, question.subject, question.explanation) == (
        *("multiple", "基础医学", "因为"),
    )
    assert found.reasons() == {
        "options are not readable": 1,
        "no answer": 1,
        "too many cells": 1,
    }


def test_medqa_answers_have_to_agree_with_their_letter(write):
    row = {"question": "Q", "options": {"A": "x", "B": "y"}, "answer": "y", "answer_idx": "B"}
    rows = [{**row, "meta_info": "step1"}, {**row, "answer": "x"}]
    found = read_medqa(write("test.jsonl", rows, lines=True), region="us")
    assert found.exam == "medqa_us" and found.questions[0].subject == "step1"
    assert found.reasons() == {"answer and answer_idx disagree": 1}


@pytest.mark.parametrize(
    ("values", "letters"), [([1, 4], "AD"), ([0, 3], "AD"), ([0, -1], "A"), (["1", "4"], "AD")]
)
def test_medmcqa_tells_where_its_answers_are_counted_from(write, values, letters):
    rows = [{**MEDMCQA, "id": str(place), "cop": cop} for place, cop in enumerate(values)]
    found = read_medmcqa(write("dev.json", rows, lines=True))
    assert "".join(next(iter(question.answer)) for question in found.questions) == letters
    assert {question.kind for question in found.questions} == {"single"}


def test_medmcqa_that_does_not_tell_has_to_be_told(write):
    path = write("dev.json", [{**MEDMCQA, "cop": 1}], lines=True)
    assert "neither 0 nor 4" in refused(lambda: read_medmcqa(path))
    assert read_medmcqa(path, first_option=1).questions[0].answer == {"A"}
    assert read_medmcqa(path, first_option=0).questions[0].answer == {"B"}
    both = write("both.json", [{**MEDMCQA, "cop": cop} for cop in (0, 4)], lines=True)
    assert "both 0 and 4" in refused(lambda: read_medmcqa(both))
    for rows in ([MEDMCQA], [{**MEDMCQA, "cop": -1}]):
        path = write("test.json", rows, lines=True)
        assert "no question of medmcqa can be used; row 1: no answer" in refused(
            lambda path=path: read_medmcqa(path)
        )


def test_pubmedqa_is_split_by_its_ground_truth(write):
    rows = {"11": PUBMEDQA, "12": {**PUBMEDQA, "final_decision": "no"}, "13": PUBMEDQA}
    path = write("ori_pqal.json", rows)
    assert len(read_pubmedqa(path).questions) == 3
    truth = write("truth.json", {"11": "yes", "12": "maybe", "99": "no"})
    found = read_pubmedqa(path, ground_truth=truth)
    assert [(one.id, one.context) for one in found.questions] == [("11", "First.\nSecond.")]
    assert found.reasons() == {"answers disagree": 1, "answer without a question": 1}
    twice = write("twice.json", '{"11": "yes", "11": "no"}')
    assert "PMID 11 stands in it more than once" in refused(
        lambda: read_pubmedqa(path, ground_truth=twice)
    )
    assert "needed are QUESTION, CONTEXTS" in refused(lambda: read_pubmedqa(truth))
    odd = write("odd.json", {"11": PUBMEDQA, "12": {**PUBMEDQA, "final_decision": "perhaps"}})
    assert read_pubmedqa(odd).reasons() == {"answer key outside the options": 1}


def test_subject_folders_are_read_as_published(write, tmp_path):
    for subject in CMMLU_SUBJECTS:
        write(f"cmmlu/test/{subject}.csv", ",Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,B\n")
    for subject in CEVAL_SUBJECTS:
        table = "id,question,A,B,C,D,answer\n7,问,甲,乙,丙,丁,C\n"
        write(f"ceval/val/{subject}_val.csv", table)
        write(f"ceval/test/{subject}_test.csv", "id,question,A,B,C,D\n7,问,甲,乙,丙,丁\n")
    for subject in MMLU_SUBJECTS:
        write(f"mmlu/test/{subject}_test.csv", '"Which, then?",a,b,c,d,D\nWho?,a,b,c,d,A\n')
    cmmlu = read_subject_folder(tmp_path / "cmmlu", exam="cmmlu", split="test")
    assert cmmlu.questions[0].id == "anatomy:0" and len(cmmlu.questions) == 8
    ceval = read_subject_folder(tmp_path / "ceval", exam="ceval", split="val")
    assert ceval.questions[0].id == "basic_medicine:7" and ceval.questions[0].answer == {"C"}
    mmlu = read_subject_folder(tmp_path / "mmlu", exam="mmlu", split="test")
    assert mmlu.questions[0].question == "Which, then?" and len(mmlu.questions) == 12
    message = refused(lambda: read_subject_folder(tmp_path / "mmlu", exam="mmlu", split="dev"))
    assert "6 of 6 files of mmlu's split 'dev' are missing" in message
    assert "row 1: no answer" in refused(
        lambda: read_subject_folder(tmp_path / "ceval", exam="ceval", split="test")
    )


def test_examples_are_of_the_same_class_and_never_the_question_itself():
    questions = [
        Question(
            id=str(place),
            exam="x",
            subject=("a", "b")[place % 2],
            question=f"问题{place}",
            options={"A": "1", "B": "2"},
            answer=frozenset("A"),
            kind="single",
        )
        for place in range(20)
    ]
    for question in questions:
        drawn = draw_examples(question, questions, num_examples=5, seed=3)
        assert drawn == draw_examples(question, questions, num_examples=5, seed=3)
        assert len({one.id for one in drawn}) == 5 and question not in drawn
        assert {one.subject for one in drawn} == {question.subject}
    first = draw_examples(questions[0], questions, num_examples=2, seed=None)
    assert [one.id for one in first] == ["2", "4"]
    assert drawn != draw_examples(questions[19], questions, num_examples=5, seed=4)
    message = refused(lambda: draw_examples(questions[0], questions, num_examples=10, seed=0))
    assert message == "num_examples: 10, but class a has 9 examples beside question 0"


@pytest.fixture(scope="module")
def real_sets(shared_data):
    """Each real file and its set."""
    return list(read_all(shared_data / "6_exam"))


def read_all(exams):
    for path in [*exams.glob("apollo_*.jsonl"), *exams.glob("fewshot/apollo_*.jsonl")]:
        yield path, read_apollo(path)
    for path in exams.glob("cmexam_*.csv"):
        yield path, read_cmexam(path)
    us, mainland = exams / "medqa_us_4opt_test.jsonl", exams / "mmedbench_chinese_tiny.jsonl"
    yield us, read_medqa(us, region="us")
    yield mainland, read_medqa(mainland, region="mainland")
    yield exams / "pubmedqa_ori_pqal.json", read_pubmedqa(exams / "pubmedqa_ori_pqal.json")
    for exam, place in (("cmmlu", 2), ("ceval", 1)):
        for path in (exams / "cc_by_nc_sa").glob(f"{exam}_*.csv"):
            parts = path.stem.split("_")
            subject = "_".join(parts[2:] if place == 2 else parts[1:-1])
            yield path, read_subject_files({path: subject}, exam=exam)


def test_every_real_file_is_read_whole(shared_data, real_sets):
    manifest = json.loads((shared_data / "MANIFEST.json").read_text(encoding="utf-8"))
    rows = {row["file"]: row["rows"] for row in manifest if row["file"].startswith("6_exam/")}
    without_questions = {"cmb_test_choice_answer.jsonl", "pubmedqa_test_ground_truth.json"}
    seen = {}
    for path, found in real_sets:
        seen[path.relative_to(shared_data).as_posix()] = len(found.questions)
        assert not found.excluded and found.num_rows == len(found.questions)
    assert seen == {
        file: count
        for file, count in rows.items()
        if file.removeprefix("6_exam/") not in without_questions
    }
    assert sum(seen.values()) > 8000


def test_real_cmb_questions_keep_their_options_of_one_character(shared_data):
    found = read_apollo(shared_data / "6_exam" / "apollo_zh_cmb-single.jsonl")
    short = [
        {label for label, text in question.options.items() if len(text.strip(".")) == 1}
        for question in found.questions
    ]
    assert sum(map(bool, short)) == 28
    keys = zip(short, found.questions, strict=True)
    assert sum(bool(question.answer & labels) for labels, question in keys) == 14
    with_four = sum(len(question.options) == 4 for question in found.questions)
    assert with_four == found.num_empty_options == 82


def test_real_pubmedqa_questions_of_the_test_split_are_matched(shared_data):
    exams = shared_data / "6_exam"
    found = read_pubmedqa(
        exams / "pubmedqa_ori_pqal.json", ground_truth=exams / "pubmedqa_test_ground_truth.json"
    )
    assert len(found.questions) == 80
    assert found.reasons() == {"answer without a question": 420}


def test_real_cmb_answers_are_joined_to_questions(shared_data, write):
    answers = shared_data / "6_exam" / "cmb_test_choice_answer.jsonl"
    with answers.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    options = {letter: f"选项{letter}" for letter in "ABCDEFG"}
    asked = [
        {**row, "answer": None, "question": f"第{row['id']}题", "option": options} for row in rows
    ]
    found = read_cmb(write("questions.json", asked), answers=answers)
    assert len(found.questions) == 11_200 and not found.excluded
    assert sum(question.kind == "multiple" for question in found.questions) == 1190
    assert sum(len(question.answer) == 1 for question in found.questions) == 10_035
    assert len({(one.category, one.subject) for one in found.questions}) == 28


REPLIES = (
    "{key}",
    "答案是{key}。",
    "{asked}\n因此选{key}。",
    "{asked}\n\nThe answer is ({key}).",
    "\\boxed{{{key}}}",
    "{asked}\n{options}\n答案：{key}",
    "{key}\n{wrong}",
    "{judged}",
    "正确答案：{key}. {text}",
    "{text}",
    "答案是{text}",
    "{text}。\n{asked}",
)


@pytest.mark.parametrize("reply", REPLIES)
def test_answers_to_real_questions_are_read_out_of_replies(real_sets, reply):
    num_read = 0
    for _, found in real_sets:
        for question in found.questions[::25] if found.exam != "pubmedqa" else ():
            if len(question.answer) > 1 and "{text}" in reply:
                continue
            texts = {label: text.strip(" .") for label, text in question.options.items()}
            key = "".join(sorted(question.answer))
            wrong = [label for label in texts if label not in question.answer]
            said = reply.format(
                key=key,
                asked=question.question,
                text=texts[key[0]],
                options="\n".join(f"{label}. {text}" for label, text in texts.items()),
                wrong="".join(f"{label}项{texts[label]}错误。" for label in wrong),
                judged="\n".join(
                    f"{label}. {text}：{'错误' if label in wrong else '正确'}"
                    for label, text in texts.items()
                ),
            )
            several = question.kind == "multiple"
            given = extract_answer(said, question.options, several=several)
            assert given == question.answer, (said, texts)
            num_read += 1
    assert num_read > 300

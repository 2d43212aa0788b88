"""Readers of the question sets with reference answers, on their published formats."""

import json

import pytest

from huatuo_jax.evaluation.reference_answers import read_cmedqa2, read_huatuo26m, read_webmedqa

QUESTIONS = 'question_id,content\n7,"头痛，怎么办？"\n8,咳嗽\n9,没有人问\n'
ANSWERS = "ans_id,question_id,content\n1,7,多休息\n2,7,喝水\n3,8,去医院\n4,9,\n"
CANDIDATES = "question_id,ans_id,cnt,label\n7,1,0,1\n7,3,1,0\n7,2,2,1\n8,3,0,1\n8,1,1,0\n"


@pytest.fixture
def cmedqa2(tmp_path):
    def write(questions=QUESTIONS, answers=ANSWERS, **candidates):
        (tmp_path / "question.csv").write_text(questions, encoding="utf-8")
        (tmp_path / "answer.csv").write_text(answers, encoding="utf-8")
        for split, text in (candidates or {"test": CANDIDATES}).items():
            (tmp_path / f"{split}_candidates.txt").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_cmedqa2_takes_every_answer_that_is_marked_right(cmedqa2):
    found = read_cmedqa2(cmedqa2())
    assert [(one.id, one.question, one.references) for one in found] == [
        ("7", "头痛，怎么办？", ("多休息", "喝水")),
        ("8", "咳嗽", ("去医院",)),
    ]


def test_cmedqa2_train_candidates_repeat_a_right_answer_with_each_wrong_one(cmedqa2):
    train = "question_id,pos_ans_id,neg_ans_id\n8,3,1\n8,3,2\n7,2,3\n"
    found = read_cmedqa2(cmedqa2(train=train), split="train")
    assert [(one.id, one.references) for one in found] == [("8", ("去医院",)), ("7", ("喝水",))]


def test_cmedqa2_keeps_a_blank_answer_as_an_empty_reference(cmedqa2):
    found = read_cmedqa2(cmedqa2(test="question_id,ans_id,cnt,label\n9,4,0,1\n"))
    assert found[0].references == ("",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test": CANDIDATES + "9,99,0,1\n"}, r"candidates.txt:7: there is no answer '99'"),
        ({"test": CANDIDATES + "99,1,0,1\n"}, r"candidates.txt:7: there is no question '99'"),
        ({"test": CANDIDATES + "8,1,0,1\n"}, r"txt:7: answer '1' is marked right for question '8'"),
        ({"test": CANDIDATES + "8,1,0,2\n"}, r"txt:7: not a row of question_id,ans_id,cnt,label"),
        ({"test": CANDIDATES + "8,1,0\n"}, r"txt:7: not a row of question_id,ans_id,cnt,label"),
        ({"test": "question,answer\n7,1\n"}, r"txt:1: the columns are question,answer"),
        ({"test": "question_id,ans_id,cnt,label\n7,1,0,0\n"}, "no candidate is marked"),
        ({"questions": "id,content\n7,x\n"}, r"question.csv: there is no column question_id"),
        (
            {"questions": QUESTIONS + "7,again\n"},
            r"csv:5: the question_id '7' is already .*csv:2",
        ),
        ({"questions": "question_id,content\n7,\n8,x\n"}, r"question.csv:2: content is empty"),
        ({"answers": ANSWERS + "5,7\n"}, r"answer.csv:6: 2 fields, the header has 3"),
    ],
)
def test_cmedqa2_names_file_and_row_of_what_does_not_fit(cmedqa2, files, message):
    with pytest.raises(ValueError, match=message):
        read_cmedqa2(cmedqa2(**files))


def test_cmedqa2_says_which_archive_to_unpack(tmp_path, cmedqa2):
    with pytest.raises(ValueError, match=r"there is no file dev_candidates\.txt$"):
        read_cmedqa2(cmedqa2(), split="dev")
    (tmp_path / "dev_candidates.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"unpack dev_candidates\.zip there"):
        read_cmedqa2(tmp_path, split="dev")


WEB = "内科\t{}\t{}\t{}\t{}\n"


def webmedqa(tmp_path, *rows):
    path = tmp_path / "medQA.test.txt"
    path.write_text("".join(rows), encoding="utf-8")
    return path


def test_webmedqa_takes_the_answers_of_label_1(tmp_path):
    path = webmedqa(
        tmp_path,
        WEB.format(1, "q1", "头痛\u2028吗", "多休息"),
        WEB.format(0, "q1", "头痛\u2028吗", "错的"),
        WEB.format(0, "q2", '他说"疼"', "错的"),
        WEB.format(1, "q2", '他说"疼"', '用"药"'),
    )
    found = read_webmedqa(path)
    assert [(one.id, one.question, one.references, one.category) for one in found] == [
        ("q1", "头痛\u2028吗", ("多休息",), "内科"),
        ("q2", '他说"疼"', ('用"药"',), "内科"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("内科\t1\tq2\t头痛\n", r"test\.txt:2: not department, label"),
        (WEB.format(2, "q2", "头痛", "x"), r"test\.txt:2: not department, label"),
        (WEB.format(1, "q2", "头\t痛", "x"), r"test\.txt:2: not department, label"),
        (WEB.format(1, "q1", "咳嗽", "x"), r"test\.txt:2: question 'q1' has another text"),
        (WEB.format(1, "q2", "", "x"), r"test\.txt:2: question is empty"),
        (WEB.format(0, "q2", "咳嗽", "x"), r"test\.txt:2: question 'q2' has no right answer"),
    ],
)
def test_webmedqa_names_the_line_that_does_not_fit(tmp_path, row, message):
    path = webmedqa(tmp_path, WEB.format(1, "q1", "头痛", "多休息"), row)
    with pytest.raises(ValueError, match=message):
        read_webmedqa(path)


def huatuo26m(tmp_path, *rows):
    path = tmp_path / "test_datasets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_huatuo26m_reads_texts_lists_and_lists_of_lists(tmp_path):
    path = huatuo26m(
        tmp_path,
        {"questions": "头痛", "answers": "休息"},
        {"questions": [["咳嗽怎么办", "咳嗽"]], "answers": ["喝水", "去医院"]},
        {"id": "x", "instruction": ["发烧"], "input": "", "output": ["吃药"]},
        {"questions": "失眠", "answers": ""},
    )
    found = read_huatuo26m(path)
    assert [(one.id, one.question, one.references) for one in found] == [
        ("1", "头痛", ("休息",)),
        ("2", "咳嗽怎么办", ("喝水", "去医院")),
        ("x", "发烧", ("吃药",)),
        ("4", "失眠", ("",)),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, r"jsonl:2: neither questions and answers nor"),
        ({"questions": "", "answers": "b"}, r"jsonl:2: questions is empty"),
        ({"questions": [], "answers": "b"}, r"jsonl:2: questions is empty"),
        ({"questions": {"a": 1}, "answers": "b"}, r"jsonl:2: questions is a dict"),
        ({"questions": "a", "answers": []}, r"jsonl:2: question '2' has no right answer"),
        (
            {"id": "1", "questions": "a", "answers": "b"},
            r"jsonl:2: the id '1' is already .*jsonl:1",
        ),
    ],
)
def test_huatuo26m_names_the_row_that_does_not_fit(tmp_path, row, message):
    path = huatuo26m(tmp_path, {"questions": "头痛", "answers": "休息"}, row)
    with pytest.raises(ValueError, match=message):
        read_huatuo26m(path)


def test_huatuo26ms_real_test_set_is_read_whole(shared_data):
    found = read_huatuo26m(shared_data / "5_gen_benchmark" / "huatuo26M_test.json")
    assert len(found) == 3600
    assert all(one.question and len(one.references) == 1 and one.references[0] for one in found)


def test_a_missing_file_and_one_without_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_webmedqa(tmp_path / "medQA.test.txt")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="the file is empty"):
        read_huatuo26m(tmp_path / "empty.jsonl")

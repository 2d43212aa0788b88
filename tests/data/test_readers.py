import json
import random

import pytest

from huatuo_jax.data.files import read_rows
from huatuo_jax.data.formats.adapters import ADAPTERS, Adapter, row_adapter
from huatuo_jax.data.formats.dialogues import Terms
from huatuo_jax.data.formats.turns import RowLeftOut, RowProblem
from huatuo_jax.data.readers import (
    ALL_FORMATS,
    REPEATED_PROMPT,
    read_cases,
    read_comparisons,
    read_dialogues,
    read_exams,
    read_prompts,
    read_records,
)
from huatuo_jax.data.records import Case, Comparison, Dialogue, ExamQuestion, Message, Prompt

ASK, TELL = {"from": "human", "value": "头痛？"}, {"from": "gpt", "value": "休息。"}


def talk(number):
    asked = {"from": "human", "value": f"第{number}问：头痛怎么办？"}
    return {"id": f"t{number}", "conversations": [asked, TELL]}


def write(tmp_path, rows, name="talks.jsonl"):
    path = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\n".join(lines).encode())
    return path


def test_good_rows_come_in_order_and_are_counted(tmp_path):
    reading = read_dialogues(write(tmp_path, map(talk, range(5))), kind="real_instruction")
    dialogues = list(reading)
    assert [dialogue.id for dialogue in dialogues] == ["t0", "t1", "t2", "t3", "t4"]
    assert {(d.kind, d.source) for d in dialogues} == {("real_instruction", "talks")}
    assert (reading.rows, reading.rows_used, reading.records) == (5, 5, 5)
    assert reading.formats == {"turns": 5}
    assert list(reading) == dialogues and reading.rows == 5
    assert reading.summary().endswith("talks.jsonl: 5 rows (turns 5); 5 records; 0 errors")


CORRUPT = [
    ('{"conversations": [{"from": "human", "va', "not JSON: .*cut off"),
    ({"id": "x"}, "missing keys: a row with the keys id, while rows before were 'turns'"),
    ({"conversations": [ASK, {"from": "gpt", "value": ""}]}, r"turn 2 \(assistant\) is empty"),
    ({"conversations": [ASK, ASK, TELL]}, "turns 1 and 2 are both of the user"),
    ({"conversations": [ASK, {"from": "gpt", "value": "药" * 1_700_000}]}, "has 1,700,000 char"),
    ({"conversations": [TELL]}, "the dialogue starts with the assistant"),
    ({"conversations": [ASK]}, "no assistant turn"),
    ({"conversations": [ASK, {"from": "nurse", "value": "好"}]}, "unknown role 'nurse'"),
    ({"conversations": [ASK, {"from": "gpt", "value": ["好"]}]}, "is list, not text"),
    ({"conversations": [ASK, {"from": "gpt"}]}, "turn 2 needs role and content"),
]


@pytest.mark.parametrize(("bad", "said"), CORRUPT, ids=[said for _, said in CORRUPT])
def test_a_corrupt_row_is_one_error_with_file_line_and_reason(tmp_path, bad, said):
    rows = [talk(number) for number in range(20)]
    rows[12] = bad
    path = write(tmp_path, rows)
    reading = read_dialogues(path, max_error_share=0.05)
    assert [dialogue.id for dialogue in reading] == [f"t{n}" for n in range(20) if n != 12]
    (error,) = reading.errors
    assert str(error).startswith(f"{path}:13: ")
    with pytest.raises(RowProblem, match=said):
        raise RowProblem(error.reason)
    assert len(error.reason) < 400
    assert reading.rows == 20 == reading.rows_used + 1


def test_a_line_in_another_encoding_is_one_error(tmp_path):
    path = write(tmp_path, map(talk, range(20)))
    lines = path.read_bytes().split(b"\n")
    lines[4] = lines[4].decode().encode("gb18030")
    path.write_bytes(b"\n".join(lines))
    reading = read_dialogues(path, max_error_share=0.05)
    assert len(list(reading)) == 19
    assert reading.errors[0].line == 5 and "not UTF-8: byte 0x" in reading.errors[0].reason


def test_reading_stops_with_the_first_errors_when_too_many_rows_are_bad(tmp_path):
    rows = [talk(number) for number in range(100)]
    for number in range(20, 28):
        rows[number] = {"conversations": []}
    path = write(tmp_path, rows)
    assert len(list(read_dialogues(path, max_error_share=0.08))) == 92
    with pytest.raises(ValueError, match="8 of 100 rows are bad, more than max_error_share=0.07"):
        list(read_dialogues(path, max_error_share=0.07))
    with pytest.raises(ValueError, match=r"talks\.jsonl:21: no turns\n(.*\n)+  and 3 more$"):
        list(read_dialogues(path))


def test_a_long_file_stops_on_the_way(tmp_path):
    path = write(tmp_path, ["{}"] * 30_000)
    with pytest.raises(ValueError, match="10000 of 10000 rows are bad"):
        list(read_dialogues(path))


def test_a_file_without_rows_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no rows"):
        list(read_dialogues(write(tmp_path, ["[]"], "none.json")))


def test_a_last_unanswered_turn_is_dropped_and_counted(tmp_path):
    reading = read_dialogues(write(tmp_path, [{"conversations": [ASK, TELL, ASK]}, talk(1)]))
    assert [len(dialogue.messages) for dialogue in reading] == [2, 2]
    assert reading.repairs == {"last unanswered turn dropped": 1}
    assert "mended: last unanswered turn dropped 1" in reading.summary()


def test_max_turn_chars_is_the_longest_turn_that_reads(tmp_path):
    path = write(tmp_path, [talk(1)])
    longest = len(talk(1)["conversations"][0]["value"])
    assert len(list(read_dialogues(path, max_turn_chars=longest))) == 1
    with pytest.raises(ValueError, match=f"more than max_turn_chars={longest - 1}"):
        list(read_dialogues(path, max_turn_chars=longest - 1))


def test_a_file_may_mix_formats(tmp_path):
    rows = [talk(1), {"instruction": "a", "output": "b"}, ["问：a", "答：b"]]
    reading = read_dialogues(write(tmp_path, rows))
    assert len(list(reading)) == 3
    assert reading.formats == {"turns": 1, "alpaca": 1, "huatuo": 1}


FAMILIES = [
    (read_dialogues, Dialogue, talk(1)),
    (read_prompts, Prompt, {"question": "头痛？"}),
    (read_comparisons, Comparison, {"prompt": "头痛？", "chosen": "a", "rejected": "b"}),
    (read_cases, Case, {"medical_case": "头痛", "doctor_diagnosis": "感冒"}),
    (read_exams, ExamQuestion, {"question": "?", "options": {"A": "x", "B": "y"}, "answer": "A"}),
]


@pytest.mark.parametrize(("reader", "record", "row"), FAMILIES)
def test_each_family_has_its_reader_and_the_general_reader_tells_it(tmp_path, reader, record, row):
    path = write(tmp_path, [row])
    (one,) = reader(path)
    assert isinstance(one, record) and list(read_records(path)) == [one]


def test_another_family_than_asked_for_is_named(tmp_path):
    for _, _, row in FAMILIES[2:]:
        with pytest.raises(ValueError, match="looks like '.*', a (comparison|case|exam), not like"):
            list(read_dialogues(write(tmp_path, [row])))
    with pytest.raises(ValueError, match="looks like 'turns', a dialogue, not like a comparison"):
        list(read_comparisons(write(tmp_path, [talk(1)])))


def test_the_general_reader_keeps_to_the_family_of_the_first_row(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "a"}]
    reading = read_records(write(tmp_path, rows), max_error_share=0.5)
    assert len(list(reading)) == 1
    assert "missing keys" in reading.errors[0].reason


def test_a_prompt_stands_once_for_each_id(tmp_path):
    rows = [
        {"id": 1, "question": "头痛？"},
        {"id": 2, "question": "头痛？"},
        {"id": 1, "question": "头痛？"},
        {"id": 1, "question": "咳嗽？"},
        {"question": "发烧？"},
        {"question": "发烧？"},
    ]
    reading = read_prompts(write(tmp_path, rows), max_error_share=0.5)
    assert [prompt.messages[0].content for prompt in reading] == ["头痛？", "头痛？", "发烧？"]
    assert reading.exclusions == {REPEATED_PROMPT: 2}
    (error,) = reading.errors
    assert (error.line, error.reason) == (4, "id '1' stood in line 1, over another prompt")


def test_adapters_are_chosen_by_name_or_given(tmp_path):
    path = write(tmp_path, [["头痛？", "休息。"]])
    with pytest.raises(ValueError, match="a list, not an object, no known format"):
        list(read_dialogues(path))
    reading = read_dialogues(path, adapter="apollo")
    (dialogue,) = reading
    assert reading.formats == {"apollo: turns": 1}
    own = row_adapter("own", "pairs", lambda row: {"question": row[0], "answer": row[1]})
    (other,) = read_dialogues(path, adapter=own)
    assert other.messages == dialogue.messages
    assert dialogue.messages == (Message("user", "头痛？"), Message("assistant", "休息。"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "poem"}, "kind is 'poem'"),
        ({"adapter": "poem"}, "adapter is 'poem'"),
        ({"max_turn_chars": 0}, "max_turn_chars is 0"),
        ({"max_error_share": 1.5}, "max_error_share is 1.5"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        read_dialogues(write(tmp_path, [talk(1)]), **options)


def test_a_missing_file_is_an_error_at_once():
    with pytest.raises(ValueError, match="no such file"):
        read_dialogues("nowhere/talks.jsonl")


def test_csv_columns_and_parquet_read_like_json(tmp_path):
    csv_path = tmp_path / "talks.csv"
    csv_path.write_bytes(
        'id,ask,answer\n7,"头痛？\n三天",休息。\n8,咳嗽？,喝水。\n'.encode("gb18030")
    )
    first, second = read_dialogues(csv_path)
    assert first.id == "7" and first.messages[0].content == "头痛？\n三天"
    assert second.messages == (Message("user", "咳嗽？"), Message("assistant", "喝水。"))
    datasets = pytest.importorskip("datasets")
    rows = [{"json_dialogue": json.dumps(["问：头痛？", "答：休息。"])}] * 2
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "arrow")
    reading = read_dialogues(tmp_path / "arrow")
    assert [len(dialogue.messages) for dialogue in reading] == [2, 2]
    assert reading.formats == {"huatuo": 2}


SEEDS = [
    ["问：头痛？", "答：休息。"],
    {"data": ["问：头痛？", "答：休息。"]},
    {"json_dialogue": '["问：头痛？", "答：休息。"]'},
    talk(1),
    {"messages": [{"role": "user", "content": "a"}], "reference": "b", "diagnosis": "c"},
    {"instruction": "a", "input": "", "output": "b", "history": [["c", "d"]], "system": "e"},
    {"question": "a", "answer": "b", "kind": "real_instruction", "source": "s", "id": 1},
    {"prompt": "a", "chosen": "b", "rejected": "c", "p_chosen": 0.5, "margin": 1},
    {"prompt": [{"role": "user", "content": "a"}], "chosen": [TELL], "rejected": TELL},
    {"chosen": [ASK, TELL], "rejected": [ASK, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "output": ["b", "c", "d"], "history": []},
    {"prompt": "a", "answers": [{"text": "b"}, {"text": "c"}], "scores": [1, 2]},
    {"prompt": "a", "responses": [{"text": "b", "score": 1}, {"text": "c", "score": 2}]},
    {"medical_case": "a", "doctor_diagnosis": "b", "department": "c"},
    {"question": "a", "options": {"A": "b", "B": "c"}, "answer": "A", "explanation": "d"},
    {"question": "a", "option": "(A) b\n(B) c", "anwer": "(A)", "answer": "(A)"},
    {"Question": "a", "A": "b", "B": "c", "Answer": "A"},
    {"department": "a", "title": "b", "ask": "c", "answer": "d"},
    {"instruction": " <user>: a <bot>: b <user>: c", "output": "d", "input": ""},
    {"description": "a", "QA_pairs": [{"question": "b", "answer": "c"}]},
    {"QUESTION": "a", "CONTEXTS": ["b"], "final_decision": "yes"},
    {"prompt": "[start of conversation]\npatient: a\ndoctor: b\n[end of conversation]"},
]
JUNK = [None, True, 0, -1.5, float("nan"), 10**400, "", " ", "x", "\ud800", [], {}, [None], [[]]]
JUNK += [{"role": "user"}, {"from": 3, "value": 4}, [{"role": [], "content": {}}], "A" * 300]


def spoilt(value, generator):
    """The value with one part of it, at any depth, changed for junk or taken out."""
    if isinstance(value, dict) and value and generator.random() < 0.85:
        key = generator.choice(list(value))
        if generator.random() < 0.2:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: spoilt(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.85:
        place = generator.randrange(len(value))
        return [*value[:place], spoilt(value[place], generator), *value[place + 1 :]]
    return generator.choice(JUNK)


def test_no_spoilt_row_breaks_a_reader_and_every_row_is_accounted_for(tmp_path):
    generator = random.Random(7)
    rows = [*SEEDS, *(spoilt(generator.choice(SEEDS), generator) for _ in range(700))]
    path = write(tmp_path, [json.dumps(row) for row in rows])
    readers = (read_dialogues, read_prompts, read_comparisons, read_cases, read_exams, read_records)
    for reader in readers:
        for adapter in (None, *(adapter.name for adapter in ADAPTERS)):
            reading = reader(path, adapter=adapter, max_error_share=1.0, max_turn_chars=250)
            records = list(reading)
            assert reading.rows == len(rows) and reading.records == len(records)
            left_out = reading.exclusions.total()
            assert reading.rows_used + len(reading.errors) + left_out == reading.rows
            assert all(1 <= error.line <= len(rows) and error.reason for error in reading.errors)
            for record in records:
                json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False).encode()


def test_no_spoilt_row_raises_anything_but_its_reason_in_any_format():
    generator = random.Random(11)
    for _ in range(3000):
        row = spoilt(generator.choice(SEEDS), generator)
        for row_format in ALL_FORMATS:
            if row_format.matches(row):
                try:
                    row_format.convert(row, Terms("f"))
                except (RowProblem, RowLeftOut) as reason:
                    assert str(reason)


def test_an_adapter_that_loses_a_row_is_stopped(tmp_path):
    def every_second(rows):
        yield from (row for number, row in enumerate(rows) if number % 2)

    adapter = Adapter("halving", "", every_second)
    with pytest.raises(ValueError, match="adapter halving took 4 rows and accounts for 2"):
        list(read_dialogues(write(tmp_path, map(talk, range(4))), adapter=adapter))


ADAPTER_OF = {
    "1_sft_single_real/toyhom": "toyhom",
    "2_sft_multi_real/remedi": "remedi",
    "3_distilled/apollo": "apollo",
    "3_distilled/bentsao_liver": "bentsao",
    "4_preference/disc_gpt4_scores": "disc_scores",
    "5_gen_benchmark/CMB-Clin": "cmb_clin",
    "5_gen_benchmark/huatuo26M": "huatuo26m",
    "6_exam/apollo": "apollo_exam",
    "6_exam/fewshot": "apollo_exam",
    "6_exam/pubmedqa": "pubmedqa",
}
# Answers without their questions.
NO_RECORDS = ("6_exam/cmb_test_choice_answer.jsonl", "6_exam/pubmedqa_test_ground_truth.json")
# What does not become a record of its own: lines that repeat a dialogue, lists of equal answers.
LEFT_OUT = {"remedi_dev_human_annotation.txt": 540 - 66, "oaast_rm_zh.json": 2}


@pytest.mark.slow
def test_every_real_file_reads_without_an_error_and_with_its_count_of_rows(shared_data):
    manifest = json.loads((shared_data / "MANIFEST.json").read_text(encoding="utf-8"))
    files = [entry for entry in manifest if entry.get("file", "t")[0] in "123456"]
    files = [entry for entry in files if entry["file"] not in NO_RECORDS]
    assert len(files) == 90
    for entry in files:
        name = entry["file"]
        adapter = next((a for start, a in ADAPTER_OF.items() if name.startswith(start)), None)
        reading = read_records(shared_data / name, adapter=adapter)
        records = list(reading)
        assert reading.errors == [], name
        assert reading.rows == entry["rows"], name
        left_out = reading.exclusions.total()
        assert left_out == LEFT_OUT.get(name.split("/")[-1], 0), name
        assert reading.rows_used + left_out == entry["rows"], name
        if name != "4_preference/oaast_rm_zh.json":
            assert len(records) == reading.rows_used, name


def test_real_ranked_lists_give_all_their_pairs(shared_data):
    path = shared_data / "4_preference" / "oaast_rm_zh.json"
    expected = 0
    for row in json.loads(path.read_text(encoding="utf-8")):
        texts = row["output"]
        expected += sum(a != b for i, a in enumerate(texts) for b in texts[i + 1 :])
    assert len(list(read_comparisons(path))) == expected


def test_real_rows_stand_in_the_line_that_their_error_would_name(shared_data):
    path = shared_data / "1_sft_single_real" / "toyhom_internal_medicine.csv"
    lines = path.read_bytes().decode("gb18030").split("\n")
    for row in read_rows(path):
        start = f"{row.value['department']},"
        assert lines[row.line - 1].startswith((start, f'"{start}'))

import csv
import json
from collections import Counter

import numpy as np
import pytest

from huatuo_jax import inspect_data
from huatuo_jax.core import command_line
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.chat.template import truncate
from huatuo_jax.data.chat.templates import by_name
from huatuo_jax.data.inspection import (
    Distribution,
    Inspector,
    check_json_target,
    complaint,
    fitting_adapters,
    totals,
    write_json,
)
from huatuo_jax.data.inspection_report import file_text, totals_text
from huatuo_jax.data.readers import ReadOptions, read_dialogues
from huatuo_jax.hf.tokenizer import load_tokenizer
from tests.called import call

KINDS = ("real_instruction", "distilled_conversation")
GENERAL = by_name("huatuogpt")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SAMPLE_FOLDER / "tokenizer")


@pytest.fixture
def inspect(tokenizer):
    def inspect(path, *, template="huatuogpt", max_tokens=2048, num_samples=1, **read):
        inspector = Inspector(
            template=by_name(template),
            tokenizer=tokenizer,
            max_tokens=max_tokens,
            num_samples=num_samples,
            read=ReadOptions(**read),
        )
        return inspector(path)

    return inspect


def spoken(*contents, **fields):
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": turns, **fields}


def talk(number, exchanges=1):
    texts = [f"第{number}位病人的第{i}句话。" for i in range(2 * exchanges)]
    return spoken(*texts, id=f"t{number}", kind=KINDS[number % 2])


def write(path, rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes(("\n".join(lines) + "\n").encode("utf-8"))
    return path


# Sizes and counts.


def test_percentiles_are_sizes_that_occur():
    spread = Distribution.of([*range(1, 101)])
    assert spread == (1, 50.5, 50, 90, 99, 100)
    assert Distribution.of([7]) == (7, 7.0, 7, 7, 7, 7)
    assert Distribution.of([3, 1, 2, 10]) == (1, 4.0, 2, 10, 10, 10)


def test_a_dialogue_file_is_counted_as_a_plain_loop_counts_it(tmp_path, inspect, tokenizer):
    path = write(tmp_path / "a.jsonl", [talk(i, exchanges=1 + i % 4) for i in range(12)])
    report = inspect(path)
    rows = [GENERAL.render(d.messages, tokenizer) for d in read_dialogues(path)]
    assert report.tally.sizes["tokens"] == [len(row.token_ids) for row in rows]
    trained = [sum(row.trained_mask[1:]) for row in rows]
    assert report.tally.sizes["trained tokens"] == trained
    assert report.tally.sizes["turns"] == [2 * (1 + i % 4) for i in range(12)]
    assert report.tally.sizes["characters"] == [
        sum(len(turn["content"]) for turn in talk(i, exchanges=1 + i % 4)["messages"])
        for i in range(12)
    ]
    total = sum(len(row.token_ids) for row in rows)
    assert report.tally.trained_share == pytest.approx(sum(trained) / total)
    assert report.kinds == {KINDS[0]: 6, KINDS[1]: 6}
    assert (report.family, report.rows, report.records) == ("dialogue", 12, 12)
    assert report.packing().unpacked_efficiency == pytest.approx(total / (12 * 2048))
    assert report.packing().num_rows == -(-total // 2048)


def test_dialogues_over_the_limit_are_counted_by_what_truncation_does(tmp_path, inspect, tokenizer):
    rows = [talk(0), talk(1, exchanges=8), talk(2, exchanges=3), spoken("问" * 300, "答" * 300)]
    path = write(tmp_path / "a.jsonl", rows)
    limit = 150
    tally = inspect(path, max_tokens=limit).tally
    options = {"max_tokens": limit, "policy": "drop_oldest_turns"}
    shortened = [truncate(GENERAL, d.messages, tokenizer, **options) for d in read_dialogues(path)]
    kept = [one for one in shortened if one.rendered]
    assert tally.lengths_kept == [len(one.rendered.token_ids) for one in kept]
    assert tally.dropped == 1 and tally.shortened >= 1
    assert tally.messages_dropped == sum(one.num_messages_dropped for one in kept)
    assert tally.over == tally.shortened + tally.dropped
    text = file_text(inspect(path, max_tokens=limit))
    assert f"truncation drops the oldest turns of {tally.shortened}" in text


def test_comparisons_are_measured_with_both_answers(tmp_path, inspect, tokenizer):
    rows = [
        {"question": "头痛怎么办？", "chosen": "多休息，多喝水，注意保暖。", "rejected": "忍着。"},
        {"question": "咳嗽怎么办？", "chosen": "去看。", "rejected": "不用管它，过几天就会好的。"},
    ]
    report = inspect(write(tmp_path / "pairs.jsonl", rows), max_tokens=60)
    tally = report.tally
    assert report.family == "comparison" and tally.chosen_longer == 1
    assert tally.sizes["characters chosen"] == [13, 3]
    for row, prompt, chosen, rejected in zip(
        rows,
        tally.sizes["tokens prompt"],
        tally.sizes["tokens with chosen"],
        tally.sizes["tokens with rejected"],
        strict=True,
    ):
        ends = [len(tokenizer.encode(f"{row[k]} ")) for k in ("chosen", "rejected")]
        assert (chosen - prompt, rejected - prompt) == tuple(ends)  # `<s>` for `</s>`
    over = [max(pair) > 60 for pair in zip(*list(tally.sizes.values())[-2:], strict=True)]
    assert tally.over == sum(over)
    assert "the chosen answer is the longer one in 50.0% of the pairs" in file_text(report)
    chosen, rejected = report.samples
    marked = ["".join(s.text for s in one.segments if s.marked) for one in (chosen, rejected)]
    assert marked == ["多休息，多喝水，注意保暖。 </s>", "忍着。 </s>"]
    assert all(segment.marked for segment in rejected.segments)


def test_cases_exams_and_prompts_are_recognised_and_shown(tmp_path, inspect):
    case = {"medical_case": "咳嗽三天", "doctor_diagnosis": "感冒", "department": "内科"}
    exam = {"question": "最常见的是", "options": {"A": "甲", "B": "乙"}, "answer": "AB"}
    prompt = {"question": "头痛怎么办？", "diagnosis": "偏头痛"}
    reports = [
        inspect(write(tmp_path / name, [row]))
        for name, row in (("c.jsonl", case), ("e.jsonl", exam), ("p.jsonl", prompt))
    ]
    assert [report.family for report in reports] == ["case", "exam", "prompt"]
    cases, exams, prompts = map(file_text, reports)
    assert "diagnosis" in cases and "咳嗽三天" in cases and "over" not in cases
    assert "1 questions have more than one right option" in exams
    assert reports[1].tally.sizes["options"] == [2]
    assert "偏头痛" in prompts and "<HuatuoGPT>：" in prompts
    assert not any(segment.marked for segment in reports[2].samples[0].segments)
    together = totals_text(reports)
    assert "exam questions" in together and "all 3 files" in together


# Samples.


@pytest.mark.parametrize("template", ["huatuogpt", "chatml", "llama2"])
def test_samples_join_to_the_rendering_and_mark_exactly_the_trained_tokens(
    tmp_path, inspect, tokenizer, template
):
    row = spoken("开头 [[x]] </s>", " 第一行\n第二行 ", "再问 <|im_end|>", "再答")
    path = write(tmp_path / "a.jsonl", [row])
    report = inspect(path, template=template)
    (dialogue,) = read_dialogues(path)
    rendered = by_name(template).render(dialogue.messages, tokenizer)
    segments = report.samples[0].segments
    whole = tokenizer.decode(rendered.token_ids, clean_up_tokenization_spaces=False)
    assert "".join(segment.text for segment in segments) == whole
    marked = [i for i, trained in zip(*rendered[:2], strict=True) if trained]
    assert "".join(s.text for s in segments if s.marked) == tokenizer.decode(marked)
    special = [s.text for s in segments if s.special]
    ids = [i for i in rendered.token_ids if i in tokenizer.all_special_ids]
    assert "".join(special) == "".join(tokenizer.convert_ids_to_tokens(ids))


def test_a_sentencepiece_sample_keeps_its_blanks(tmp_path, llama_tokenizer):
    path = write(tmp_path / "a.jsonl", [spoken("头痛 how long", "since Monday")])
    inspector = Inspector(template=by_name("llama2"), tokenizer=llama_tokenizer)
    answer = [s.text for s in inspector(path).samples[0].segments if s.marked and not s.special]
    assert answer == [" since Monday "]


def test_marks_cannot_be_mistaken_for_text(tmp_path, inspect):
    row = spoken("assistant  trained  [[假]] </s>", "真的\n  user  第二行\x1b[31m ")
    lines = file_text(inspect(write(tmp_path / "a.jsonl", [row]))).split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("sample"))
    shown = lines[start + 1 :]
    assert shown[2] == "  user                        <病人>：assistant  trained  [[假]] </s>␣"
    assert shown[3] == "  assistant  trained          <HuatuoGPT>：真的↵"
    # A line of the text cannot look like a segment: the columns before it stay empty.
    assert shown[4] == " " * 30 + "  user  第二行\\x1b[31m␣␣"
    assert shown[5] == "  assistant  trained special  </s>"


def test_a_long_segment_is_shown_in_part_and_says_so(tmp_path, inspect):
    report = inspect(write(tmp_path / "a.jsonl", [spoken("问", "药" * 5000)]))
    text = file_text(report)
    assert "[... 4,113 characters not shown ...]" in text
    assert text.count("药") == 5000 - 4113
    assert sum(len(s.text) for s in report.samples[0].segments if s.marked) > 5000


def test_a_terminal_gets_colour_and_no_line_wider_than_it_is(tmp_path, inspect):
    rows = [talk(0), "{", spoken("头痛" * 100, "休息" * 100)]
    report = inspect(write(tmp_path / "a[bold].jsonl", rows), num_samples=2)
    text = file_text(report, width=60)
    assert "\x1b[32m" in text and "a[bold].jsonl" in text
    assert "\x1b" not in file_text(report)
    from rich.cells import cell_len
    from rich.text import Text

    for shown in (text, totals_text([report, report], width=60)):
        assert max(cell_len(line) for line in Text.from_ansi(shown).plain.split("\n")) <= 60


# What is wrong with a file.

CORRUPT = [
    (2, '{"messages": [{"role": "user", "cont', "(the line seems cut off)"),
    (4, {"id": "x", "text": "y"}, "missing keys: a row with the keys id, text"),
    (5, spoken("头痛", " "), "turn 2 (assistant) is empty"),
    (7, {"messages": [spoken("a")["messages"][0]] * 2}, "turns 1 and 2 are both of the user"),
    (8, spoken("头痛", "药" * 1_700_000), "1,700,000 characters, more than max_turn_chars=100,000"),
]


@pytest.fixture
def corrupt_file(tmp_path):
    rows = [talk(i) for i in range(20)]
    for line, row, _ in CORRUPT:
        rows.insert(line - 1, row)
    path = write(tmp_path / "corrupt.jsonl", rows)
    with path.open("ab") as file:
        file.write(json.dumps(talk(3), ensure_ascii=False).encode("gb18030") + b"\n")
    return path


def test_every_bad_row_is_told_by_its_line_and_reason(corrupt_file, inspect):
    report = inspect(corrupt_file)
    assert (report.rows, report.records, len(report.errors)) == (26, 20, 6)
    text = file_text(report)
    for line, _, reason in CORRUPT:
        (found,) = [error for error in report.errors if error.line == line]
        assert reason in found.reason
        assert any(f"line {line}: " in shown and reason in shown for shown in text.split("\n"))
    assert report.errors[-1].line == 26 and "not UTF-8: byte 0x" in report.errors[-1].reason
    assert "26: 20 used, 6 bad, 0 left out" in text


def test_only_the_first_errors_are_shown_and_the_rest_counted(tmp_path, inspect):
    report = inspect(write(tmp_path / "a.jsonl", [talk(0), *["{"] * 25]))
    text = file_text(report)
    assert text.count("not JSON") == 10 and "and 15 more (--json=FILE writes them all)" in text
    assert complaint([report], max_error_share=1.0) is None
    assert "25 of 26 rows are bad, more than max_error_share=0.5" in complaint(
        [report], max_error_share=0.5
    )


def test_a_file_that_breaks_off_is_reported_up_to_there(tmp_path, inspect):
    path = tmp_path / "a.json"
    whole = json.dumps([talk(i) for i in range(5)], ensure_ascii=False, indent=1)
    path.write_text(whole[: whole.index("第4位")], encoding="utf-8")
    report = inspect(path)
    assert report.records == 4 and "after 4 good rows" in report.failure
    assert "cannot be read" in file_text(report)
    assert complaint([report], max_error_share=1.0) == report.failure


def test_an_answer_that_is_not_to_be_trained_is_shown_without_the_mark(tmp_path, inspect):
    row = spoken("头痛", "休息", "还有呢", "喝水")
    row["messages"][1]["weight"] = 0
    report = inspect(write(tmp_path / "a.jsonl", [row]))
    segments = [one for one in report.samples[0].segments if one.label == "assistant"]
    assert not any(one.marked for one in segments if "休息" in one.text)
    assert any(one.marked for one in segments if "喝水" in one.text)
    whole = inspect(write(tmp_path / "b.jsonl", [spoken("头痛", "休息", "还有呢", "喝水")]))
    assert report.tally.sizes["tokens"] == whole.tally.sizes["tokens"]
    assert report.tally.sizes["trained tokens"][0] < whole.tally.sizes["trained tokens"][0]


def test_columns_that_json_lacks_are_named_in_the_report(tmp_path, inspect):
    rows = [json.dumps({**talk(n), "share": float("nan"), "note": "\ud83d"}) for n in range(3)]
    report = inspect(write(tmp_path / "a.jsonl", rows))
    text = file_text(report)
    for said in ("3  share: NaN read as null", "3  note: half a character replaced by U+FFFD"):
        assert said in text
    write_json([report], tmp_path / "report.json")
    read = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert read["files"][0]["repairs"]["share: NaN read as null"] == 3


def test_another_encoding_is_read_when_it_is_said(tmp_path, inspect):
    path = tmp_path / "a.csv"
    path.write_bytes("question,answer\nRücken,Müde\n".encode("cp1252"))
    assert "cp1252" in inspect(path).failure
    report = inspect(path, encoding="cp1252")
    assert report.failure is None and report.layout == "csv, CP1252"
    assert any("Müde" in one.text for one in report.samples[0].segments)


def test_files_that_are_no_data_are_one_line_each(tmp_path, inspect):
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "wide.json").write_bytes("[1, 2]".encode("utf-16-le"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    names = ["absent.jsonl", "empty.json", "wide.json", "image.png"]
    reports = [inspect(tmp_path / name) for name in names]
    for report, message in zip(
        reports, ["no such file", "is empty", "utf-16-le", "ending|UTF-8"], strict=True
    ):
        assert any(part in report.failure for part in message.split("|"))
        assert "\n" not in report.failure and report.rows == 0
    line = complaint([*reports, inspect(write(tmp_path / "a.jsonl", [talk(0)]))], max_error_share=0)
    assert line.startswith("4 of 5 files should not be used as they are: ")
    assert line.endswith("; and 1 more") and "\n" not in line
    assert totals_text(reports).count("cannot be read") == 4


def test_a_row_the_template_refuses_is_told_by_line(tmp_path, tokenizer):
    tokenizer = load_tokenizer(SAMPLE_FOLDER / "tokenizer")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if '禁' in m['content'] %}{{ raise_exception('not that') }}"
        "{% endif %}<s>{{ m['content'] }}</s>{% endfor %}"
    )
    path = write(tmp_path / "a.jsonl", [spoken("禁", "甲"), spoken("可", "乙")])
    report = Inspector(template=by_name("tokenizer"), tokenizer=tokenizer, num_samples=2)(path)
    (refused,) = report.tally.refused
    assert refused.line == 1 and "not that" in refused.reason
    text = file_text(report)
    assert "not rendered" in text and "line 1: " in text
    assert len(report.tally.sizes["tokens"]) == 1 and len(report.samples) == 1


# Formats and adapters.

ODD_ROWS = {
    "toyhom": {"department": "内科", "title": "头痛", "ask": "三天了", "answer": "休息"},
    "bentsao": {"instruction": "<user>: 头痛 <bot>: 多久 <user>: 三天", "output": "休息"},
    "apollo": ["头痛怎么办", "休息"],
    "apollo_exam": {"question": "q", "option": "(A) x\n(B) y", "anwer": "(B)"},
    "huatuo26m": {"instruction": ["头痛"], "output": ["休息"]},
    "cmb_clin": {"description": "病历", "QA_pairs": [{"question": "诊断", "answer": "感冒"}]},
    "disc_scores": {
        "id": 1,
        "model": "m",
        "source": "s",
        "scores": "Accuracy: 4",
        "prompt": "[start of conversation]\npatient: 头痛\ndoctor: 休息\n[end of conversation]",
    },
}
COMMON_ROWS = [
    talk(0),
    {"instruction": "头痛", "input": "", "output": "休息"},
    ["问：头痛", "答：休息"],
    {"data": ["问：头痛", "答：休息"]},
    {"question": "头痛", "answer": "休息"},
    {"question": "头痛", "chosen": "休息", "rejected": "忍着"},
    {"question": "q", "options": {"A": "x", "B": "y"}, "answer": "B"},
    {"medical_case": "头痛", "doctor_diagnosis": "感冒"},
]


@pytest.mark.parametrize("name", ODD_ROWS)
def test_the_adapter_of_an_odd_source_is_named(tmp_path, inspect, name):
    path = write(tmp_path / "a.jsonl", [ODD_ROWS[name]] * 3)
    report = inspect(path)
    assert [adapter.name for adapter in report.fitting_adapters] == [name]
    assert f"--adapter={name} fits these rows" in file_text(report)
    assert f'as "{name}: ' in file_text(inspect(path, adapter=name))
    if not report.records:
        assert f"--adapter={name} fits its rows" in complaint([report], max_error_share=0.01)


@pytest.mark.parametrize("row", COMMON_ROWS, ids=str)
def test_common_formats_get_no_hint_of_an_adapter(tmp_path, inspect, row):
    report = inspect(write(tmp_path / "a.jsonl", [row] * 3))
    assert report.records == 3 and report.fitting_adapters == ()


def test_an_unknown_format_says_its_keys_and_lists_what_is_known(tmp_path, inspect):
    path = write(tmp_path / "a.jsonl", [{"foo": 1, "bar": "x"}] * 3)
    report = inspect(path)
    text = file_text(report)
    assert "line 1: a row with the keys bar, foo, no known format" in text
    assert "alpaca: instruction, output" in text and "remedi: ReMeDi" in text
    assert complaint([report], max_error_share=0.01).endswith("no row is in a known format")
    with pytest.raises(ValueError, match=r"(?s)bar, foo, no known format\n.*known formats: huatuo"):
        list(read_dialogues(path))


def test_settings_that_make_no_sense_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_tokens is 0"):
        Inspector(template=GENERAL, tokenizer=tokenizer, max_tokens=0)
    with pytest.raises(ValueError, match="num_samples is -1"):
        Inspector(template=GENERAL, tokenizer=tokenizer, num_samples=-1)
    with pytest.raises(
        ValueError, match="template 'llama3' does not go with the tokenizer: .*no token"
    ):
        Inspector(template=by_name("llama3"), tokenizer=tokenizer)


# Several files, and the JSON.


def test_totals_are_those_of_one_file_with_all_rows(tmp_path, inspect):
    rows = [talk(i, exchanges=1 + i % 3) for i in range(9)]
    parts = [inspect(write(tmp_path / f"{i}.jsonl", [*rows[i::3], "{"])) for i in range(3)]
    (total,) = totals(parts)
    whole = inspect(write(tmp_path / "all.jsonl", [*rows[0::3], *rows[1::3], *rows[2::3]]))
    assert total.distributions() == whole.distributions()
    assert total.packing() == whole.packing() and total.kinds == whole.kinds
    assert (total.rows, total.records, len(total.errors)) == (12, 9, 3)
    assert totals(parts[:1]) == []
    text = totals_text(parts)
    assert f"{tmp_path}/2.jsonl:4: " in text  # Of several files, errors are told with theirs.
    assert any(line.split() == ["total", "12", "9", "3"] for line in text.split("\n"))


def test_the_json_holds_every_error_and_the_samples(corrupt_file, inspect, tmp_path):
    report = inspect(corrupt_file)
    write_json([report, report], tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    first = written["files"][0]
    assert [error["line"] for error in first["errors"]] == [e.line for e in report.errors]
    assert first["sizes"]["tokens"]["maximum"] == max(report.tally.sizes["tokens"])
    assert first["samples"][0]["segments"][-1]["text"] == "</s>"
    assert written["totals"][0]["rows"] == 2 * report.rows


def test_the_json_goes_to_no_input_and_no_missing_folder(tmp_path):
    path = write(tmp_path / "a.jsonl", [talk(0)])
    with pytest.raises(ValueError, match="it would be written over"):
        check_json_target(tmp_path / "." / "a.jsonl", [str(path)])
    for target in (tmp_path, tmp_path / "no" / "b.json"):
        with pytest.raises(ValueError, match="a file in a folder that exists"):
            check_json_target(target, [str(path)])


# The command itself.


def test_the_command_reports_and_then_refuses_a_corrupt_file(corrupt_file, tmp_path):
    good = write(tmp_path / "good.jsonl", [talk(i) for i in range(4)])
    arguments = (good, corrupt_file, f"--json={tmp_path / 'out.json'}", "--samples=2")
    done = call("inspect", *map(str, arguments))
    assert done.returncode == 1
    for line, _, reason in CORRUPT:
        assert any(f"line {line}: " in s and reason in s for s in done.stdout.split("\n"))
    assert "all 2 files" in done.stdout and "assistant  trained " in done.stdout
    (message,) = done.stderr.strip().split("\n")
    assert message == (
        f"error: {corrupt_file}: 6 of 26 rows are bad, more than max_error_share=0.01 allows"
    )
    assert len(json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["files"]) == 2


def main(*arguments):
    """The command in this process: called with its files and flags."""
    given = [str(one) for one in arguments]
    inspect_data.main(command_line.parse(inspect_data.Flags, given, name="inspect"))


def test_the_command_tells_wrong_input_before_it_reads(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [talk(0)])
    for arguments, message in (
        (["--adapter=nobody"], "adapter is 'nobody'; it should be one of: toyhom"),
        (["--template=nobody"], "template: 'nobody' is not known; known are huatuogpt, chatml"),
        ([f"--tokenizer={tmp_path}"], "no tokenizer in this folder"),
        (["--max_error_share=2"], "max_error_share is 2.0; it should lie between 0 and 1"),
        ([f"--json={path}"], "it would be written over"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            main(path, *arguments)
    assert capsys.readouterr().out == ""


def test_the_command_says_nothing_but_the_error_of_an_absent_file(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such file or folder"):
        main(tmp_path / "absent.jsonl")
    assert capsys.readouterr().out == ""


def test_the_sample_data_passes_the_command(capsys):
    main(*sorted(SAMPLE_FOLDER.glob("*.jsonl")), "--samples=0")
    text = capsys.readouterr().out
    assert "all 6 files" in text and "all 4 files of dialogues" in text


# Real data.

ADAPTER_OF = {
    "1_sft_single_real/toyhom": "toyhom",
    "2_sft_multi_real/remedi": "remedi",
    "3_distilled/apollo": "apollo",
    "3_distilled/bentsao_liver": "bentsao",
    "4_preference/disc_gpt4_scores": "disc_scores",
}


def real_files(shared_data, *, group):
    """Name, rows and adapter of each file of a group (`1` to `4`)."""
    for entry in json.loads((shared_data / "MANIFEST.json").read_text(encoding="utf-8")):
        name = entry.get("file", "tokenizers")
        if name.startswith(f"{group}_"):
            adapter = next((a for start, a in ADAPTER_OF.items() if name.startswith(start)), None)
            yield name, entry["rows"], adapter


@pytest.mark.parametrize(
    ("group", "families"),
    [
        pytest.param("1", {"dialogue": 2}, marks=pytest.mark.slow),
        ("2", {"dialogue": 3}),
        pytest.param("3", {"dialogue": 22}, marks=pytest.mark.slow),
        pytest.param("4", {"dialogue": 18, "comparison": 4}, marks=pytest.mark.slow),
    ],
)
def test_every_real_file_of_groups_1_to_4_is_inspected_whole(shared_data, inspect, group, families):
    found = Counter()
    for name, rows, adapter in real_files(shared_data, group=group):
        report = inspect(shared_data / name, adapter=adapter)
        assert (report.rows, report.errors, report.failure) == (rows, (), None), name
        assert complaint([report], max_error_share=0.0) is None
        assert report.tally.refused == [] and len(report.tally.sizes) >= 4
        text = file_text(report)
        assert all(part in text for part in ("kind", "rows", "turns", "tokens", "errors", "sample"))
        assert any(segment.marked for segment in report.samples[0].segments), name
        found[report.family] += 1
    assert found == families


def test_real_files_are_told_their_adapters_and_only_those_that_need_one(shared_data):
    for group in "1234":
        for name, _, adapter in real_files(shared_data, group=group):
            fitting = fitting_adapters(shared_data / name, ReadOptions())
            assert [one.name for one in fitting] == ([adapter] if adapter else []), name


def test_corrupt_copies_of_real_files_give_the_promised_messages(shared_data, tmp_path, inspect):
    source = shared_data / "2_sft_multi_real" / "disc_test_examples.jsonl"
    lines = source.read_bytes().split(b"\n")
    row = json.loads(lines[4])
    key = "conversation"
    empty = {**row, key: [row[key][0], {**row[key][1], "content": ""}]}
    twice = {**row, key: [row[key][0], *row[key]]}
    long = {**row, key: [row[key][0], {**row[key][1], "content": "药" * 1_750_000}]}
    without = {name: value for name, value in row.items() if name != key}
    lines[1] = lines[1].decode()[:300].encode()
    lines[3] = lines[3].decode().encode("gb18030")
    for number, changed in ((4, empty), (6, twice), (8, long), (10, without)):
        lines[number] = json.dumps(changed, ensure_ascii=False).encode()
    path = tmp_path / "copy.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = inspect(path)
    reasons = {error.line: error.reason for error in report.errors}
    assert sorted(reasons) == [2, 4, 5, 7, 9, 11]
    for line, reason in (
        (2, "not JSON"),
        (4, "not UTF-8"),
        (5, "turn 2 (assistant) is empty"),
        (7, "turns 1 and 2 are both of the user"),
        (9, "1,750,000 characters"),
        (11, "missing keys"),
    ):
        assert reason in reasons[line]


def test_a_gb18030_table_is_read_as_what_it_is(tmp_path, inspect):
    path = tmp_path / "a.csv"
    with path.open("w", encoding="gb18030", newline="") as file:
        table = csv.writer(file)
        table.writerow(["question", "answer"])
        table.writerows(
            [f"第{i}问：头痛怎么办？", "多休息，多喝水。\n注意保暖。"] for i in range(200)
        )
    report = inspect(path)
    assert report.layout == "csv, GB18030" and report.records == 200
    assert np.mean(report.tally.sizes["characters"]) > 20

import csv
import decimal
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from huatuo_jax.data.files import Row, RowError, find_layout, read_rows
from huatuo_jax.data.readers import read_dialogues

ROWS = [{"ask": f"第{number}个问题：\n怎么办？", "answer": f"回答{number}"} for number in range(40)]


def write(tmp_path, name, text, encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def dump(row):
    return json.dumps(row, ensure_ascii=False)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows"])
@pytest.mark.parametrize(
    ("text", "first_lines"),
    [
        ("\n".join(map(dump, ROWS)), [1, 2, 3]),
        ("\r\n\r\n".join(map(dump, ROWS)), [1, 3, 5]),
        (dump(ROWS), [1, 1, 1]),
        (json.dumps(ROWS, ensure_ascii=False, indent=4), [2, 6, 10]),
        ("[\n" + ",\n".join(map(dump, ROWS)) + "\n]\n", [2, 3, 4]),
    ],
    ids=["lines", "lines with blanks", "list on one line", "indented list", "list of lines"],
)
def test_json_reads_whatever_its_ending_layout_and_encoding(
    tmp_path, encoding, name, text, first_lines
):
    rows = list(read_rows(write(tmp_path, name, text, encoding)))
    assert [row.value for row in rows] == ROWS
    assert [row.line for row in rows[:3]] == first_lines


def test_bare_lists_read_as_lines_as_a_list_and_as_a_single_row(tmp_path):
    talks = [["问：a", "答：b"], ["问：c", "答：d"]]
    for text in ("\n".join(map(dump, talks)), dump(talks), json.dumps(talks, indent=1)):
        assert [row.value for row in read_rows(write(tmp_path, "t.json", text))] == talks
    assert [row.value for row in read_rows(write(tmp_path, "t.json", dump(talks[0])))] == talks[:1]


def test_an_object_of_objects_gives_its_values_with_their_keys_as_ids(tmp_path):
    text = json.dumps({"11": {"q": "a"}, "12": {"q": "b", "id": "own"}}, indent=2)
    rows = list(read_rows(write(tmp_path, "d.json", text)))
    assert [row.value for row in rows] == [{"id": "11", "q": "a"}, {"id": "own", "q": "b"}]
    assert [row.line for row in rows] == [2, 5]
    single = json.dumps({"ask": "a", "answer": "b"}, indent=2)
    assert [r.value for r in read_rows(write(tmp_path, "s.json", single))] == [json.loads(single)]


def test_an_object_of_lists_of_turns_gives_its_dialogues_with_their_ids(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path, "d.json", json.dumps({"11": turns, "12": turns}, indent=1))
    assert [row.value for row in read_rows(path)] == [
        {"id": "11", "messages": turns},
        {"id": "12", "messages": turns},
    ]
    talk = ["问：a", "答：b"]
    path = write(tmp_path, "h.json", dump({"11": talk, "12": talk}))
    assert [row.value for row in read_rows(path)] == [
        {"id": "11", "data": talk},
        {"id": "12", "data": talk},
    ]
    for single in (
        {"prompt": turns[:1], "completion": turns[1:]},
        {"conversations": {"from": ["human"], "value": ["a"]}, "options": {}},
        {"messages": turns, "answers": [{"text": "b"}]},
    ):
        path = write(tmp_path, "s.json", json.dumps(single, indent=1))
        assert [row.value for row in read_rows(path)] == [single]


def test_the_reason_of_a_row_with_thousands_of_fields_is_short(tmp_path):
    entries = {f"id{number}": ["a", "b"] for number in range(3000)}
    reading = read_dialogues(write(tmp_path, "d.json", dump(entries)), max_error_share=1.0)
    assert list(reading) == [] and len(str(reading.errors[0])) < 400 + len(str(tmp_path))
    with pytest.raises(ValueError) as caught:
        list(read_dialogues(tmp_path / "d.json"))
    assert len(str(caught.value)) < 900 + 3 * len(str(tmp_path))
    long = RowError("f", 1, "a" * 50_000)
    assert len(long.reason) < 400 and long.reason.startswith("aaa") and " ... " in long.reason


def test_a_field_that_stands_twice_in_an_object_is_an_error_by_its_name(tmp_path):
    text = '{"q": "a", "answer": "b", "answer": "c"}\n' + dump(ROWS[0])
    bad, good = read_rows(write(tmp_path, "d.jsonl", text))
    assert bad.line == 1 and "the field 'answer' occurs twice in one object" in bad.reason
    assert good.value == ROWS[0]
    for whole in ('[{"a": 1, "a": 2}, {"a": 3}]', '{"a": 1, "a": 2}'):
        with pytest.raises(ValueError, match="'a' occurs twice"):
            list(read_rows(write(tmp_path, "d.json", whole)))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_carriage_returns_alone_end_lines_too(tmp_path, name):
    if name.endswith(".csv"):
        text = "ask,answer\r" + "\r".join(f"a{n},b{n}" for n in range(3))
    else:
        text = "\r".join(dump({"ask": f"a{n}", "answer": f"b{n}"}) for n in range(3))
    rows = list(read_rows(write(tmp_path, name, text)))
    assert [row.value for row in rows] == [{"ask": f"a{n}", "answer": f"b{n}"} for n in range(3)]
    assert [row.line for row in rows] == [number + name.endswith(".csv") for number in (1, 2, 3)]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_unicodes_line_separators_inside_a_text_end_no_line(tmp_path, line_end, name):
    rows = [{"ask": f"a\u2028b\u2029c\u0085{number}", "answer": "\x1c"} for number in range(3)]
    text = line_end.join(map(dump, rows)).replace("\x1c", "\\u001c")
    found = list(read_rows(write(tmp_path, name, text)))
    assert [row.value for row in found] == rows and [row.line for row in found] == [1, 2, 3]


def test_values_that_json_lacks_are_converted_and_named_or_refuse_their_row(tmp_path):
    text = '{"a": "x\\ud83d", "b": [NaN]}\n{"a": Infinity}\n{"a": 1e999}\n{"a": 1}'
    first, second, third, fourth = read_rows(write(tmp_path, "d.jsonl", text))
    assert first.value == {"a": "x\ufffd", "b": [None]}
    assert first.mended == ("a: half a character replaced by U+FFFD", "b: NaN read as null")
    for bad, line in ((second, 2), (third, 3)):
        assert bad == RowError(
            str(tmp_path / "d.jsonl"), line, "a: holds an infinite number, which JSON cannot write"
        )
    assert fourth.value == {"a": 1} and fourth.mended == ()


def test_parquet_columns_of_any_type_become_json(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "question": ["a", "b", "c"],
            "answer": ["x", "y", "z"],
            "seen": pyarrow.array([1, 2, None], pyarrow.timestamp("ns", tz="UTC")),
            "price": pyarrow.array([decimal.Decimal("1.50"), None, None]),
            "share": [float("nan"), 0.5, None],
            "note": pyarrow.array(["\u5934".encode(), None, b"\xff\xd8"], pyarrow.binary()),
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    reading = read_dialogues(tmp_path / "d.parquet", max_error_share=0.5)
    first, second = reading
    assert first.extra["seen"].startswith("1970-01-01T00:00:00.000000001") or (
        first.extra["seen"] == "1970-01-01T00:00:00+00:00"
    )
    assert {**first.extra, "seen": 0} == {"seen": 0, "price": 1.5, "note": "头"}
    assert second.extra["share"] == 0.5
    (error,) = reading.errors
    assert error.line == 3 and error.reason == "note: holds bytes that are not UTF-8 text"
    assert reading.repairs == {
        "seen: time written as ISO 8601 text": 2,
        "price: Decimal written as a number, or as text where a float is not exact": 1,
        "share: NaN read as null": 1,
        "note: bytes read as UTF-8 text": 1,
    }


def test_a_folder_of_files_with_different_columns_reads_file_by_file(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path, "a.jsonl", dump({"question": "a", "answer": "b", "n": 1}))
    write(tmp_path, "b.jsonl", dump({"question": "c", "answer": "d", "n": "x"}) + "\n{")
    write(tmp_path, "c.jsonl", dump({"messages": [{"role": "user", "content": "e"}]}))
    rows = list(read_rows(tmp_path))
    assert [(pathlib.Path(row.file).name, row.line) for row in rows] == [
        ("a.jsonl", 1),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
        ("c.jsonl", 1),
    ]
    assert [row.value["n"] for row in rows[:2]] == [1, "x"] and isinstance(rows[2], RowError)
    reading = read_dialogues(tmp_path, max_error_share=0.9)
    places = [reading.place for _ in reading]
    assert places == [f"{tmp_path / name}:1" for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        list(read_rows(tmp_path, split="test"))


def test_cut_lines_are_errors_with_their_line_and_the_rest_reads(tmp_path):
    lines = [dump(row) for row in ROWS]
    lines[0], lines[7] = lines[0][:20], lines[7][:-3]
    for name in ("cut.jsonl", "cut.json"):
        path = write(tmp_path, name, "\n".join(lines))
        rows = list(read_rows(path))
        errors = [row for row in rows if isinstance(row, RowError)]
        assert [error.line for error in errors] == [1, 8]
        assert all("not JSON" in e.reason and "cut off" in e.reason for e in errors)
        assert str(errors[0]).startswith(f"{path}:1: not JSON: ")
        assert [row.value for row in rows if isinstance(row, Row)] == ROWS[1:7] + ROWS[8:]


def test_deep_nesting_and_endless_numbers_are_row_errors(tmp_path):
    text = "\n".join([dump(ROWS[0]), "[" * 200_000, "9" * 5000, dump(ROWS[1])])
    rows = list(read_rows(write(tmp_path, "odd.jsonl", text)))
    assert [isinstance(row, RowError) for row in rows] == [False, True, True, False]


def test_a_list_that_breaks_off_says_where_after_its_good_rows(tmp_path):
    text = json.dumps(ROWS, ensure_ascii=False, indent=1)
    cut = text[: text.index("第30个")]
    path = write(tmp_path, "cut.json", cut)
    given = []
    with pytest.raises(ValueError, match=rf"cut\.json:{cut.count(chr(10)) + 1}: .*30 good rows"):
        given.extend(read_rows(path))
    assert [row.value for row in given] == ROWS[:30]
    for broken in ("[", '[{"a": 1}', '[{"a": 1} {"a": 2}]', '[{"a": 1}] tail', '[{"a": 1},'):
        with pytest.raises(ValueError, match="not JSON"):
            list(read_rows(write(tmp_path, "b.json", broken)))


def test_undecodable_bytes_in_a_list_give_line_and_offset(tmp_path):
    data = json.dumps(ROWS, ensure_ascii=False, indent=1).encode()
    place = data.index("第20个".encode())
    path = tmp_path / "bad.json"
    path.write_bytes(data[:place] + b"\xff" + data[place:])
    line = data[:place].count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"bad\.json:{line}: .*0xff at offset {place} "):
        list(read_rows(path))


def to_csv(rows, **options):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_csv_rows_begin_where_their_marker_stands(tmp_path, encoding, line_end):
    text = to_csv(ROWS, lineterminator=line_end)
    rows = list(read_rows(write(tmp_path, "rows.csv", text, encoding)))
    assert [row.value for row in rows] == ROWS
    lines = text.split("\n")
    for number, row in enumerate(rows):
        assert f"第{number}个" in lines[row.line - 1]


def test_tab_separated_rows_read(tmp_path):
    text = to_csv(ROWS, delimiter="\t")
    assert [row.value for row in read_rows(write(tmp_path, "rows.tsv", text))] == ROWS


def test_csv_rows_of_another_width_are_errors(tmp_path):
    rows = list(read_rows(write(tmp_path, "w.csv", "a,b\n1,2\n3\n4,5,6\n\n7,8\n")))
    assert [row.value for row in rows if isinstance(row, Row)] == [
        {"a": "1", "b": "2"},
        {"a": "7", "b": "8"},
    ]
    errors = [(row.line, row.reason) for row in rows if isinstance(row, RowError)]
    assert errors == [(3, "1 fields, the header has 2"), (4, "3 fields, the header has 2")]


def test_blank_cells_are_absent_and_names_of_columns_are_taken_without_blanks(tmp_path):
    text = 'ask, answer ,note\na,b,\n," ",c\n'
    rows = list(read_rows(write(tmp_path, "t.csv", text)))
    assert [row.value for row in rows] == [
        {"ask": "a", "answer": "b", "note": None},
        {"ask": None, "answer": None, "note": "c"},
    ]


def test_a_column_that_the_header_names_twice_is_refused_by_its_name(tmp_path):
    path = write(tmp_path, "t.csv", "ask,answer,ask \na,b,c\n")
    with pytest.raises(ValueError, match=r"t\.csv:1: the header names the column 'ask' twice"):
        list(read_rows(path))
    path = write(tmp_path, "t.csv", "ask,,answer,\na,1,b,\n")  # Without a name there may be more.
    (row,) = read_rows(path)
    assert row.value == {"ask": "a", "column 2": "1", "answer": "b", "column 4": None}


@pytest.mark.parametrize("rest_is_quoted", [True, False])
def test_an_unclosed_quote_loses_its_own_row_only(tmp_path, rest_is_quoted):
    quote = '"' if rest_is_quoted else ""
    lines = ["a,b", "1,one", '2,"two']
    lines += [f"{n},{quote}more{quote}" for n in range(3, 30)]
    rows = list(read_rows(write(tmp_path, "q.csv", "\n".join(lines) + "\n")))
    errors = [row for row in rows if isinstance(row, RowError)]
    assert [error.line for error in errors] == [3] and "stray quote" in errors[0].reason
    good = [row for row in rows if isinstance(row, Row)]
    assert [row.value["a"] for row in good] == ["1", *map(str, range(3, 30))]
    assert [row.line for row in good] == [2, *range(4, 31)]


def test_a_csv_row_with_undecodable_bytes_is_one_error(tmp_path):
    data = to_csv(ROWS).encode().replace("第3个".encode(), b"\xff\xfe")
    path = tmp_path / "bytes.csv"
    path.write_bytes(data)
    rows = list(read_rows(path))
    errors = [row for row in rows if isinstance(row, RowError)]
    assert len(errors) == 1 and "0xff" in errors[0].reason and len(rows) == len(ROWS)
    assert errors[0].line == data[: data.index(b"\xff")].count(b"\n") + 1


def test_a_five_megabyte_cell_reads(tmp_path):
    big = {"ask": "怎么办", "answer": "药" * 1_700_000}
    assert next(read_rows(write(tmp_path, "big.csv", to_csv([big])))).value == big
    assert next(read_rows(write(tmp_path, "big.jsonl", dump(big)))).value == big


def test_plain_lines_are_rows(tmp_path):
    rows = list(read_rows(write(tmp_path, "plain.txt", "<a> 一\r\n\n<b> 二\n")))
    assert [(row.line, row.value) for row in rows] == [(1, "<a> 一"), (3, "<b> 二")]


@pytest.mark.parametrize(
    "name", ["nothing.jsonl", "a/nothing.parquet", "../x/y/z", "data/rows.txt"]
)
def test_a_missing_file_is_said_to_be_missing(name):
    with pytest.raises(ValueError, match="no such file or folder"):
        find_layout(name)


def test_files_that_nothing_reads_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"notes\.md: neither JSON nor a known ending"):
        find_layout(write(tmp_path, "notes.md", "# notes"))
    with pytest.raises(ValueError, match="the file is empty"):
        find_layout(write(tmp_path, "empty.json", " \n"))


def test_parquet_arrow_files_and_folders_give_the_rows_of_the_list(tmp_path):
    datasets = pytest.importorskip("datasets")
    talks = [{"conversations": [{"from": "human", "value": f"{n}"}], "n": n} for n in range(5)]
    data = datasets.Dataset.from_list(talks)
    data.to_parquet(tmp_path / "rows.parquet")
    data.save_to_disk(tmp_path / "folder")
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "dict")
    arrow = next((tmp_path / "folder").glob("*.arrow"))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for path in (tmp_path / "rows.parquet", tmp_path / "folder", tmp_path / "dict", arrow):
        rows = list(read_rows(path))
        assert [row.value for row in rows] == talks
        assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert [row.value for row in read_rows(tmp_path / "hub")] == talks
    assert [row.value for row in read_rows(tmp_path / "dict", split="test")] == talks[4:]
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        list(read_rows(tmp_path / "dict", split="dev"))


def test_a_hub_name_without_a_hub_is_one_clear_line():
    pytest.importorskip("datasets")
    # HF_HUB_OFFLINE is read when the library is imported, so this runs in a process of its own.
    code = "from huatuo_jax.data.files import read_rows; next(read_rows('nobody/no-such-set'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=pathlib.Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: nobody/no-such-set: cannot be read from the hub")
    assert "HF_HUB_OFFLINE is set" in last


def test_plain_files_do_not_wait_for_the_datasets_library():
    code = "import sys, huatuo_jax.data.readers; print('datasets' in sys.modules)"
    folder = pathlib.Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"

"""JSON Lines: cut at line feeds alone, cut back on resume, and faults named by file and line."""

import json
import pathlib
import re

import pytest

from huatuo_jax.core.files import AppendedFile, read_lines, read_rows, write_rows

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
# All that `str.splitlines` takes for the end of a line and JSON may hold unescaped.
SEPARATORS = "\u2028\u2029\u0085"
ROWS = [{"step": step, "text": f"您好{SEPARATORS}再见 {step}"} for step in range(4)]


def test_separators_inside_texts_end_no_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    assert path.read_text(encoding="utf-8").count("\n") == 4
    assert all(separator in path.read_text(encoding="utf-8") for separator in SEPARATORS)
    assert read_rows(path, unfinished="read") == read_rows(path, unfinished="skip") == ROWS
    ends = [line.end for line in read_lines(path, unfinished="read")]
    assert ends[-1] == path.stat().st_size and ends == sorted(ends)


def test_windows_line_ends_and_blank_lines_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\r\n{"a": 2}\n')
    assert [(line.number, line.row) for line in read_lines(path, unfinished="read")] == [
        (1, {"a": 1}),
        (3, {"a": 2}),
    ]


def test_a_last_line_without_an_end_is_read_or_skipped_as_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert read_rows(path, unfinished="read") == [{"a": 1}, {"a": 2}]
    assert read_rows(path, unfinished="skip") == [{"a": 1}]
    path.write_bytes(b'{"a": 1}\n{"a": ')
    assert read_rows(path, unfinished="skip") == [{"a": 1}]
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not a line of JSON: "):
        read_rows(path, unfinished="read")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"nothing", "not a line of JSON: Expecting value"),
        (b"[1]", "holds a list, it should be an object"),
        (b'"text"', "holds a str, it should be an object"),
        (b'{"a": "\xff"}', "not a line of JSON: 'utf-8' codec"),
        (b"[" * 100_000, "not a line of JSON: "),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, why):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {re.escape(why)}"):
        read_rows(path, unfinished="skip")


def test_a_row_that_json_cannot_write_is_named_and_leaves_no_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    for value, why in ((float("nan"), "Out of range"), (b"bytes", "not JSON serializable")):
        with pytest.raises(ValueError, match=rf"rows\.jsonl: row 2 \(id 'b'\).*{why}"):
            write_rows(path, [{"id": "a"}, {"id": "b", "value": value}])
        assert list(tmp_path.iterdir()) == []


def test_half_a_surrogate_pair_comes_back(tmp_path):
    rows = [{"text": "祝好\ud83d"}]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl", unfinished="read") == rows


def test_a_file_is_cut_back_to_a_row_and_goes_on_as_if_never_killed(tmp_path):
    unbroken, path = tmp_path / "unbroken.jsonl", tmp_path / "rows.jsonl"
    write_rows(unbroken, ROWS)
    whole = unbroken.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with AppendedFile(path, locked=True) as file:
            num_found = sum(1 for _ in file.lines())
            assert num_found == whole[:length].count(b"\n")
            file.keep_while(lambda row: row["step"] < 2)
            file.append(ROWS[min(num_found, 2) :])
        assert path.read_bytes() == whole


def test_an_unfinished_line_is_cut_and_a_file_of_whole_lines_is_not(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content, kept in ((b"", b""), (b"{", b""), (b"{}\n", b"{}\n"), (b"{}\n{}", b"{}\n")):
        path.write_bytes(content)
        with AppendedFile(path, locked=False) as file:
            file.cut_unfinished()
        assert path.read_bytes() == kept


def test_two_writers_cannot_share_a_locked_file(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    with AppendedFile(path, locked=True):
        with pytest.raises(ValueError, match=r"rows\.jsonl: another process writes this file"):
            AppendedFile(path, locked=True)
    AppendedFile(path, locked=True).close()


def test_no_row_of_a_batch_is_added_where_one_cannot_be_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    with AppendedFile(path, locked=False) as file:
        with pytest.raises(ValueError, match="row 2 cannot be written"):
            file.append([{"a": 1}, {"a": {1}}])
        file.append([{"a": 3}])
    assert json.loads(path.read_text()) == {"a": 3}


def test_nothing_else_reads_json_by_lines_of_its_own():
    """`splitlines` beside `json.loads` is how files came to be cut at U+2028."""
    own = {
        str(path.relative_to(REPOSITORY))
        for folder in ("huatuo_jax", "launch")
        for path in (REPOSITORY / folder).rglob("*.py")
        if re.search(r"splitlines\(|for \w+ in file\b|map\(json\.loads, ", path.read_text("utf-8"))
        and re.search(r"json\.loads", path.read_text("utf-8"))
    }
    # The distributed module reads single values, and cuts messages at line ends.
    assert own <= {"huatuo_jax/core/files.py", "huatuo_jax/core/distributed.py"}

"""Texts from anywhere stay texts in a Markdown file."""

import re

import pytest

from huatuo_jax.core.markdown import fenced, inline, interval, number, plain, table


def test_a_fence_is_longer_than_any_in_the_text():
    text = "a\n```\n# no heading\n`````python\n---\n{{ x }}"
    lines = fenced(text).split("\n")
    fence = lines[-1]
    assert lines[0] == f"{fence}text" and set(fence) == {"`"}
    assert "\n".join(lines[1:-1]) == text
    # CommonMark closes a block at a line of as many backticks or more.
    assert not any(re.fullmatch(rf" {{0,3}}`{{{len(fence)},}}\s*", line) for line in lines[1:-1])


@pytest.mark.parametrize("end", ["\r\n", "\r", "\u2028", "\u2029", "\u0085"])
def test_every_line_break_is_a_line_feed(end):
    assert plain(f"a{end}b") == "a\nb"
    assert inline(f"a{end}---{end}# b") == "a --- # b"


def test_what_no_reader_sees_is_taken_out():
    assert plain("a\x00b\ud800c\u202ed\te\n") == "a\ufffdb\ufffdc\ufffdd\te\n"
    plain("\udcff").encode("utf-8")


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("a | b", r"a \| b"),
        ("**a** _b_ `c`", r"\*\*a\*\* \_b\_ \`c\`"),
        ("[a](http://b)", r"\[a\](http://b)"),
        ("<script>&amp;", "&lt;script>&amp;amp;"),
        ("# a", r"\# a"),
        ("---", r"\---"),
        ("> a", r"\> a"),
        ("1. a", r"1\. a"),
        ("12) a", r"12\) a"),
        ("0.5 to 1, best-of-4", "0.5 to 1, best-of-4"),
        ("a\\", "a\\\\"),
    ],
)
def test_a_text_in_a_line_is_nothing_but_text(text, written):
    assert inline(text) == written


def test_tables_and_numbers():
    assert table(["", "a"], [["b", "1"]]) == "|  | a |\n| --- | --- |\n| b | 1 |"
    assert (number(1234), number(0.12345), number(None), number(float("nan"))) == (
        "1,234",
        "0.123",
        "–",
        "–",
    )
    figure = {"value": 0.5, "low": 0.25, "high": 0.75}
    assert (interval(figure), interval(None)) == ("0.500 (0.250 to 0.750)", "–")

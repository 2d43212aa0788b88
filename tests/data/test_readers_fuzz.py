"""Rows out of a grammar of what people's files hold, written in every way that files are written.

The generator knows of each row what is right: the messages that it must give, or a part of the
reason for which it is refused or left out.
"""

import csv
import io
import itertools
import json
import random
from collections import Counter
from typing import NamedTuple

import pytest

from huatuo_jax.data.files import find_layout
from huatuo_jax.data.formats.dialogues import LABELLED_BAD
from huatuo_jax.data.formats.turns import OTHER_FIELDS, REASONING
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Message

CHINESE = [
    "您好，我最近三天一直头痛，伴有轻微恶心，请问应该怎么办？",
    "建议先多休息，多喝水，如果高烧不退请到医院就诊。",
    "请问体温多少？有没有量过血压？",
    "血压没有问题，就是有时候心里很不舒服。",
]
OTHERS = [
    "a",
    "It hurts. Since Monday?",
    '"quoted", and; more',
    "¿Qué puedo hacer?",
    "😀👍🏽",
    "[1]",
]
# What cuts a line in many a reader, or ends a text in others.
SEPARATORS = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\n", "\r", "\r\n", "\t", "\0"]
BLANK = ["", " ", "\n\n", "\u200b", "\ufeff\u200d", "\u3164", "\u2800 ", "\u0301"]
HALF = "祝好\ud83d"
OWN = [3, 2.5, None, True, "x", ["a", {"b": None}], {"c": [1]}, "\u2028", 10**30, -0.0]
WRONG_CONTENT = [3, None, {"a": 1}, ["a"], True, 1.5, [{"type": "image", "url": "u"}]]
KINDS = ["real_instruction", "distilled_conversation"]


class Case(NamedTuple):
    """A row, and what is right: messages, or a part of the reason; and what must be counted."""

    row: object
    messages: tuple[Message, ...] | None = None
    error: str | None = None
    left_out: str | None = None
    mended: tuple[str, ...] = ()


class Generator:
    """Draws cases; `only` keeps to characters that an encoding has, as it also does for tables."""

    def __init__(self, seed, *, encoding="utf-8", table=False):
        self.draw = random.Random(seed)
        self.encoding, self.table = encoding, table
        self.texts = [*CHINESE, *CHINESE, *OTHERS] if encoding == "utf-8" else CHINESE

    def text(self):
        draw = self.draw
        parts = [draw.choice(self.texts) for _ in range(draw.randint(1, 3))]
        separators = ["", " ", *SEPARATORS] if self.encoding.startswith("utf") else ["", "\n"]
        if self.table:  # The csv module of some versions cannot write or read a NUL.
            separators = [one for one in separators if one not in ("\0", "\r", "\r\n")]
        return draw.choice(separators).join(parts) + str(draw.randrange(10**6))

    def messages(self, num_exchanges):
        system = [Message("system", self.text())] if self.draw.random() < 0.2 else []
        spoken = [
            Message(role, self.text(), trained=role == "user" or self.draw.random() > 0.1)
            for _ in range(num_exchanges)
            for role in ("user", "assistant")
        ]
        return (*system, *spoken)

    def turn(self, message):
        draw = self.draw
        names = {
            "system": ["system", "System"],
            "user": ["user", "human", "patient", "病人", " User "],
            "assistant": ["assistant", "gpt", "doctor", "医生", "ChatGPT"],
        }[message.role]
        keys = draw.choice([("role", "content"), ("from", "value")])
        content = message.content
        if draw.random() < 0.1 and "\n" in content:
            parts = content.split("\n")
            content = [{"type": "text", "text": part} for part in parts]
        turn = dict(zip(keys, (draw.choice(names), content), strict=True))
        if not message.trained:
            turn[draw.choice(["weight", "train", "loss"])] = False
        elif message.role == "assistant" and draw.random() < 0.1:
            turn[draw.choice(["weight", "train", "loss"])] = True
        return turn

    def listed(self, turns):
        """The turns as a list, as columns, or as text in a cell."""
        draw = self.draw
        shapes = ["list"] * (not self.table) + ["json"] + ["python"]
        if len({tuple(turn) for turn in turns}) == 1 and not self.table:
            shapes.append("columns")
        shape = draw.choice(shapes)
        if shape == "columns":
            return {key: [turn[key] for turn in turns] for key in turns[0]}
        if shape == "list":
            return turns
        return json.dumps(turns, ensure_ascii=False) if shape == "json" else str(turns)

    def dialogue(self):
        """A good row of some shape, with its messages."""
        draw = self.draw
        messages = self.messages(draw.choice([1, 1, 2, 4]))
        marked = any(not one.trained for one in messages)
        system, spoken = (messages[:1], messages[1:]) if len(messages) % 2 else ((), messages)
        shapes = ["turns", "trl"]
        if not marked and all(one.content.strip() == one.content for one in messages):
            shapes += ["alpaca", "question"] * 2 + ["huatuo"] * (not system)
        shape = draw.choice(shapes)
        if shape == "turns":
            return self.turns_row(messages), messages
        if shape == "trl":
            prompt, completion = map(self.turn, messages[:-1]), [self.turn(messages[-1])]
            return {
                "prompt": self.listed([*prompt]),
                "completion": self.listed(completion),
            }, messages
        if shape == "huatuo":
            marks = {"user": "问：", "assistant": "答："}
            talk = [marks[one.role] + one.content for one in messages]
            text = json.dumps(talk)
            shapes = [{"json_dialogue": text}, {"data": text}] + [{"data": talk}] * (not self.table)
            return draw.choice(shapes), messages
        row = {"system": system[0].content} if system else {}
        pairs = [[a.content, b.content] for a, b in zip(spoken[:-2:2], spoken[1:-2:2], strict=True)]
        if pairs or (draw.random() < 0.3 and not self.table):
            row["history"] = json.dumps(pairs) if self.table else pairs
        names = [("instruction", "output"), ("instruct", "output")]
        if shape == "question":
            names = [("question", "answer"), ("query", "response"), ("ask", "answer")]
            names += [("prompt", "completion"), ("Question", "Response"), ("input", "output")]
        asked, answered = draw.choice(names)
        return {**row, asked: spoken[-2].content, answered: spoken[-1].content}, messages

    def turns_row(self, messages):
        key = self.draw.choice(["messages", "conversations", "conversation"])
        return {key: self.listed([self.turn(one) for one in messages])}

    def cases(self, number):
        """So many rows; by the first, a good one, the layout is told where no ending tells it."""
        return [Case(*self.dialogue()), *(self.case() for _ in range(number - 1))]

    def case(self):
        """A row with what is right: mostly a good one, often spoilt in one way."""
        row, messages = self.dialogue()
        if self.draw.random() < 0.5:
            row["id"] = str(self.draw.randrange(10**9))
        if self.draw.random() < 0.2:
            row["kind"] = self.draw.choice(KINDS)
        ways = [self.good] * 8 + [self.own_column, self.labelled, self.misspelt, self.blank]
        ways += [self.order, self.role]
        if not self.table:
            ways += [self.content, self.tools, self.beside, self.half, self.infinite, self.shape]
        return self.draw.choice(ways)(row, messages)

    def good(self, row, messages):
        return Case(row, messages)

    def own_column(self, row, messages):
        row["note"] = "x" if self.table else self.draw.choice(OWN)
        if "kind" not in row and self.draw.random() < 0.5:
            row["kind"] = "poem"
            return Case(row, messages, mended=("own column 'kind' carried along as",))
        return Case(row, messages)

    def labelled(self, row, messages):
        if self.draw.random() < 0.5:
            return Case({**row, "label": "True" if self.table else True}, messages)
        label = "False" if self.table else False
        return Case({**row, "label": label}, left_out=LABELLED_BAD)

    def misspelt(self, row, messages):
        return Case({**row, "kind": "real_instructions"}, error="did you mean 'real_instruction'")

    def broken(self, error, change):
        """A row of turns, of which one is changed so that the row is refused."""
        messages = self.messages(2)
        turns = [
            {"role": one.role, "content": one.content} | ({} if one.trained else {"weight": 0})
            for one in messages
        ]
        turns = change(turns, self.draw.randrange(len(turns)))
        return Case({"messages": self.listed(turns)}, error=error)

    def blank(self, row, messages):
        def change(turns, _):
            known = [text for text in BLANK if not escapes(text, self.encoding)]
            turns[-1]["content"] = self.draw.choice(known if self.table else BLANK)
            return turns

        return self.broken("(assistant) is empty", change)

    def order(self, row, messages):
        def change(turns, place):
            return [*turns[: place + 1], *turns[place:]]  # One stands twice.

        return self.broken("turn", change)

    def role(self, row, messages):
        def change(turns, place):
            turns[place]["role"] = self.draw.choice(["tool", "nurse", "", "function"])
            return turns

        return self.broken("unknown role", change)

    def content(self, row, messages):
        def change(turns, place):
            turns[place]["content"] = self.draw.choice(WRONG_CONTENT)
            return turns

        return self.broken("turn", change)

    def tools(self, row, messages):
        def change(turns, place):
            turns[place][self.draw.choice(["tool_calls", "function_call"])] = [{"id": "1"}]
            return turns

        return self.broken("only text can be trained on", change)

    def beside(self, row, messages):
        field, note = self.draw.choice([("reasoning_content", REASONING), ("name", OTHER_FIELDS)])
        messages = self.messages(1)
        turns = [{"role": one.role, "content": one.content} for one in messages]
        turns[-1][field] = "因为"
        plain = tuple(one._replace(trained=True) for one in messages)
        return Case({"messages": turns}, plain, mended=(note,))

    def half(self, row, messages):
        if self.draw.random() < 0.5:
            row[self.draw.choice(["id", "note"])] = HALF
            return Case(row, messages, mended=("half a character replaced",))
        turns = [{"role": "user", "content": HALF}, {"role": "assistant", "content": HALF}]
        repaired = HALF.replace("\ud83d", "\ufffd")
        told = (Message("user", repaired), Message("assistant", repaired))
        return Case({"messages": turns}, told, mended=("half a character replaced",))

    def infinite(self, row, messages):
        number = self.draw.choice([float("nan"), float("inf")])
        if number != number:
            return Case({**row, "note": {"x": [number]}}, messages, mended=("NaN read as null",))
        return Case({**row, "note": {"x": [number]}}, error="infinite number")

    def shape(self, row, messages):
        choices = [({"a": 1}, "keys a"), ([], "a row that is a list"), (3, "a row that is a int")]
        choices += [("x", "a row that is a str"), ({}, "keys (none)"), (None, "NoneType")]
        choices += [({"messages": []}, "no turns"), ({"messages": "x"}, "not a list of turns")]
        value, error = self.draw.choice(choices)
        return Case(value, error=error)


def escapes(row, encoding):
    """Whether JSON has to escape what the encoding has not."""
    try:
        json.dumps(row, ensure_ascii=False).encode(encoding)
    except UnicodeEncodeError:
        return True
    return False


def check(path, cases, lines, **keywords):
    """Each row is used as is right, or named with file, line and reason; the sum adds up."""
    reading = read_dialogues(path, max_error_share=1.0, **keywords)
    found = [(reading.line, reading.place, dialogue) for dialogue in reading]
    assert reading.rows == len(cases)
    left_out = reading.exclusions.total()
    assert reading.rows_used + len(reading.errors) + left_out == len(cases)
    assert reading.records == reading.rows_used == len(found)
    by_line = {line: dialogue for line, _, dialogue in found}
    errors = {error.line: error for error in reading.errors}
    expected_out, expected_mended = Counter(), Counter()
    for case, line in zip(cases, lines, strict=True):
        if case.messages is not None:
            assert line in by_line, (case, errors.get(line))
            dialogue = by_line[line]
            assert dialogue.messages == case.messages, case
            json.dumps(dialogue.to_json(), ensure_ascii=False, allow_nan=False).encode()
            expected_mended.update(case.mended)
        elif case.error is not None:
            assert line in errors, case
            assert errors[line].file == str(path) and case.error in errors[line].reason, case
            assert len(errors[line].reason) < 400
        else:
            expected_out[case.left_out] += 1
            assert line not in by_line and line not in errors
    assert reading.exclusions == expected_out
    for note, count in expected_mended.items():
        assert sum(n for name, n in reading.repairs.items() if note in name) >= count
    assert {place for _, place, _ in found} == {f"{path}:{line}" for line in by_line}


def lines_of(texts, line_end, *, first=1):
    """Where each text begins, when they are written one after the other."""
    lines, line = [], first
    for text in texts:
        lines.append(line)
        line += text.count(line_end) + 1
    return lines


LINE_ENDS = ["\n", "\r\n", "\r", "\r\r\n"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "gb18030", "gbk"]
WAYS = list(itertools.product(LINE_ENDS, ENCODINGS))
UTF8 = ("utf-8", "utf-8-sig", "utf-16")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("layout", ["lines", "blank lines", "list", "indented list"])
def test_every_row_of_json_is_used_rightly_or_named(tmp_path, layout, seed):
    for number, (line_end, encoding) in enumerate(WAYS):
        generator = Generator(
            f"{seed} {layout} {number}", encoding="utf-8" if encoding in UTF8 else "gbk"
        )
        cases = generator.cases(40)
        escaped = generator.draw.random() < 0.4
        indent = 1 if layout == "indented list" else None
        rows = [
            json.dumps(case.row, ensure_ascii=escaped or escapes(case.row, encoding), indent=indent)
            for case in cases
        ]
        path = tmp_path / f"{number}.{generator.draw.choice(['jsonl', 'json', 'txt', 'data'])}"
        if layout == "lines":
            text, lines = "\n".join(rows), lines_of(rows, "\n")
        elif layout == "blank lines":
            text, lines = "\n\n \n".join(rows), [1 + 3 * index for index in range(len(rows))]
        else:
            text, lines = "[\n" + ",\n".join(rows) + "\n]", lines_of(rows, "\n", first=2)
        path.write_bytes(text.replace("\n", line_end).encode(encoding))
        assert find_layout(path) == ("json list" if "list" in layout else "json lines")
        check(path, cases, lines)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_every_row_of_a_table_is_used_rightly_or_named(tmp_path, delimiter, seed):
    for number, (line_end, encoding) in enumerate(WAYS):
        generator = Generator(
            f"{seed} {delimiter} {number}",
            encoding="utf-8" if encoding in UTF8 else "gbk",
            table=True,
        )
        cases = generator.cases(30)
        names = list(dict.fromkeys(name for case in cases for name in case.row))
        generator.draw.shuffle(names)
        texts = []
        for cells in (names, *([case.row.get(name, "") for name in names] for case in cases)):
            out = io.StringIO()
            csv.writer(out, delimiter=delimiter, lineterminator="\r\n").writerow(cells)
            texts.append(out.getvalue().removesuffix("\r\n"))
        path = tmp_path / f"{number}.{'csv' if delimiter == ',' else 'tsv'}"
        # Line breaks inside a cell are line feeds whatever ends the rows, as Excel writes them.
        path.write_bytes(line_end.join(texts).encode(encoding))
        check(path, cases, lines_of(texts, "\n" if "\n" in line_end else line_end)[1:])

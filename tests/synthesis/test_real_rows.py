"""Polished rows of real dialogues: whatever changes what the doctor said is left out."""

import itertools
import json
from collections import Counter

import pytest

from huatuo_jax import synthesize
from huatuo_jax.clinic.dialogues import dialogues as clinic_dialogues
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Dialogue, Message
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.synthesis.jobs import Rejected, text_of
from huatuo_jax.synthesis.polishing import PolishingMaker, read_sources
from tests.synthesis import run_synthesis, scripted_polishing
from tests.synthesis.scripted_polishing import FAULTS, fault_of, number_of, polish, polished
from tests.synthesis.teacher_server import KEY, MODEL, TeacherServer, price_table, some_fault


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def flags(folder, server, kind, count, **given):
    exchanges = 1 if kind == "real_instruction" else 3
    source = scripted_polishing.write_source(folder / "source.jsonl", count, exchanges=exchanges)
    return {
        "kind": kind,
        "output": str(folder / "rows.jsonl"),
        "teacher": f"openai:{MODEL}",
        "base_url": server.url,
        "prices": price_table(folder / "prices.json"),
        "source": (source,),
        "num_rows": count,
        "batch_size": 50,
        **given,
    }


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["real_instruction", "real_conversation"])
def test_every_unfaithful_row_is_left_out_and_no_other(tmp_path, kind):
    count, single = 120, kind == "real_instruction"
    with TeacherServer(polish, fault=some_fault(0.2)) as server:
        run_synthesis.run(flags(tmp_path, server, kind, count, attempts=2))
    planted = {f"source-{number}": fault_of(number, single=single) for number in range(count)}
    expected_faults = FAULTS.keys() - ({"turns"} if single else set())
    assert set(planted.values()) == {None, *expected_faults}, "a fault was not planted"
    kept = rows_of(tmp_path / "rows.jsonl")
    assert {one["source_id"] for one in kept} == {
        name for name, fault in planted.items() if fault is None
    }
    rejected = Counter(one["reason"] for one in rows_of(tmp_path / "rows.jsonl.rejected.jsonl"))
    assert rejected == Counter(FAULTS[fault] for fault in planted.values() if fault is not None)


@pytest.mark.parametrize("kind", ["real_instruction", "real_conversation"])
def test_an_unfaithful_polish_is_asked_for_again_so_often_and_no_more(tmp_path, kind):
    count, attempts, calls = 12, 4, Counter()

    def faithful_in_the_end(messages):
        """Spoils a row's first replies: as many as its number says."""
        number = number_of(messages)
        calls[number] += 1
        return polished(messages, "dropped" if calls[number] <= number % 6 else None)

    with TeacherServer(faithful_in_the_end) as server:
        given = flags(tmp_path, server, kind, count, attempts=attempts)
        for _ in range(2):  # The second run finds every reply, those of all attempts.
            run_synthesis.run(given)
            assert calls == {n: min(n % 6 + 1, attempts) for n in range(count)}
        report = json.loads((tmp_path / "rows.jsonl.report.json").read_text(encoding="utf-8"))
        by_attempt = {str(one): sum(n >= one for n in calls.values()) for one in range(1, 5)}
        assert report["requests"] == {"polish": by_attempt}
        assert report["cost"]["requests"] == len(server.calls) == sum(by_attempt.values())
        assert report["cost"]["money"] == pytest.approx(server.money(server.calls), rel=1e-9)
    kept = {one["source_id"] for one in rows_of(tmp_path / "rows.jsonl")}
    assert kept == {f"source-{n}" for n in range(count) if n % 6 < attempts}
    assert report["yield"] == len(kept) / count
    assert report["rejections"]["unfaithful"]["count"] == count - len(kept)


def test_of_a_dialogue_answered_anew_only_the_faulty_turns_are_asked_for_again():
    words = ["考虑慢性胃炎。", "口服奥美拉唑，一日2次。", "连用7天。"]
    asked = [Message("user", text) for text in ("胃疼。", "怎么治？", "吃几天？")]
    turns = zip(asked, (Message("assistant", text) for text in words), strict=True)
    one = Dialogue("d", tuple(itertools.chain(*turns)), "real_conversation", "made up")
    maker = PolishingMaker(kind="real_conversation", dialogues=[one], plain=True, attempts=3)
    ((_, job),) = maker.batch(0, [])
    next(job)
    replies = {
        "answer-0.1": "您好，考虑慢性胃炎。",
        "answer-1.1": "口服奥美拉唑，一日3次。",
        "answer-2.1": "连用9天。",
        "answer-1.2": "口服奥美拉唑，一日4次。",
        "answer-2.2": "一共连用7天。",
        "answer-1.3": "可以口服奥美拉唑，一日2次。",
    }
    step, steps = job.send([None]), []
    with pytest.raises(StopIteration) as end:
        while True:
            steps.append([request.step for request in step])
            step = job.send([ChatReply(replies[request.step], "stop") for request in step])
    assert steps == [
        ["answer-0.1", "answer-1.1", "answer-2.1"],
        ["answer-1.2", "answer-2.2"],
        ["answer-1.3"],
    ]
    (row,) = end.value.value
    said = [message.content for message in row.messages if message.role == "assistant"]
    assert said == [replies[name] for name in ("answer-0.1", "answer-1.3", "answer-2.2")]
    assert row.extra["original"] == words


@pytest.mark.parametrize(
    ("ending", "reason"),
    [("length", "cut off"), ("max_tokens", "cut off"), ("content_filter", "refusal")],
)
def test_a_reply_that_did_not_come_to_its_end_is_faulty(ending, reason):
    assert text_of(ChatReply("考虑慢性胃炎。", "stop")) == "考虑慢性胃炎。"
    with pytest.raises(Rejected, match=f"{reason}: the reply ended for the reason '{ending}'"):
        text_of(ChatReply("考虑慢性胃炎。", ending))


@pytest.mark.parametrize("kind", ["real_instruction", "real_conversation"])
def test_only_the_doctors_words_change_and_the_original_is_kept(tmp_path, kind):
    with TeacherServer(polish) as server:
        run_synthesis.run(flags(tmp_path, server, kind, 40))
    sources = {row["id"]: row for row in rows_of(tmp_path / "source.jsonl")}
    reading = read_dialogues(tmp_path / "rows.jsonl")
    rows = list(reading)
    assert len(rows) > 15 and not reading.errors
    for row in rows:
        assert row.kind == kind
        before = sources[row.extra["source_id"]]["messages"]
        assert [m.role for m in row.messages] == [m["role"] for m in before]
        originals = [m["content"] for m in before if m["role"] == "assistant"]
        assert row.extra["original"] == originals
        for now, then in zip(row.messages, before, strict=True):
            assert (now.content == then["content"]) == (now.role == "user")


def test_a_dialogue_whose_question_is_near_an_earlier_one_is_not_paid_for(tmp_path):
    with TeacherServer(polish) as server:
        given = flags(tmp_path, server, "real_instruction", 8)
        rows = rows_of(tmp_path / "source.jsonl")
        again = [json.loads(json.dumps(row)) | {"id": f"again-{row['id']}"} for row in rows]
        for row in again:
            row["messages"][0]["content"] += "谢谢。"
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows + again)
        (tmp_path / "source.jsonl").write_text(text, encoding="utf-8")
        run_synthesis.run({**given, "num_rows": 16, "attempts": 1})
        assert len(server.calls) == 8
    rejected = Counter(one["reason"] for one in rows_of(tmp_path / "rows.jsonl.rejected.jsonl"))
    assert rejected["near duplicate"] == 8


def test_personal_data_of_patients_is_masked_in_all_texts(tmp_path):
    with TeacherServer(polish) as server:
        given = flags(tmp_path, server, "real_instruction", 10)
        rows = rows_of(tmp_path / "source.jsonl")
        for row in rows:
            row["id"] = f"1381234567{row['id'][-1]}"
            row["messages"][0]["content"] += "我叫李明，电话13812345678。"
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "source.jsonl").write_text(text, encoding="utf-8")
        run_synthesis.run(given)
    written = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert "李明" not in written and "[电话]" in written
    # The id of the source is no phone number, whatever it looks like.
    assert all(
        row["source_id"].startswith("1381234567") for row in rows_of(tmp_path / "rows.jsonl")
    )
    assert "电话138" not in written
    report = json.loads((tmp_path / "rows.jsonl.report.json").read_text(encoding="utf-8"))
    assert report["masked"] == {"name": report["rows"], "phone": report["rows"]}


def test_rows_with_personal_data_can_be_rejected(tmp_path):
    with TeacherServer(polish) as server:
        given = flags(tmp_path, server, "real_instruction", 10, personal_data="reject")
        rows = rows_of(tmp_path / "source.jsonl")
        number = next(n for n in range(10) if fault_of(n, single=True) is None)
        rows[number]["messages"][0]["content"] += "我叫李明。"
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "source.jsonl").write_text(text, encoding="utf-8")
        run_synthesis.run(given)
    rejected = rows_of(tmp_path / "rows.jsonl.rejected.jsonl")
    (one,) = [one for one in rejected if one["reason"] == "personal data"]
    assert one["id"].endswith(f"{number:06d}") and one["detail"] == "name 1"


@pytest.mark.parametrize("personal_data", ["mask", "reject", "keep"])
def test_personal_data_is_masked_in_what_is_left_out_unless_it_is_kept(tmp_path, personal_data):
    with TeacherServer(polish) as server:
        given = flags(tmp_path, server, "real_instruction", 30, personal_data=personal_data)
        rows = rows_of(tmp_path / "source.jsonl")
        for row in rows:
            row["messages"][0]["content"] += "我叫李明，电话13812345678。"
            row["messages"][1]["content"] += "有事打13987654321。"
        rows.append({**rows[0], "id": "again"})
        rows[-1]["messages"] = [dict(one) for one in rows[0]["messages"]]
        rows[-1]["messages"][0]["content"] += "好。"
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "source.jsonl").write_text(text, encoding="utf-8")
        run_synthesis.run(given)
    written = (tmp_path / "rows.jsonl.rejected.jsonl").read_text(encoding="utf-8")
    reasons = {one["reason"] for one in rows_of(tmp_path / "rows.jsonl.rejected.jsonl")}
    assert {"near duplicate", "unfaithful"} <= reasons
    assert ("personal data" in reasons) == (personal_data == "reject")
    for one in ("李明", "13812345678", "13987654321"):
        assert (one in written) == (personal_data == "keep"), one
        page = (tmp_path / "rows.jsonl.report.html").read_text(encoding="utf-8")
        assert one not in page


def test_rows_that_are_in_an_evaluation_set_are_left_out(tmp_path):
    with TeacherServer(polish) as server:
        given = flags(tmp_path, server, "real_instruction", 20)
        kept_number = next(n for n in range(20) if fault_of(n, single=True) is None)
        source = rows_of(tmp_path / "source.jsonl")
        test = {"question": source[kept_number]["messages"][0]["content"]}
        path = tmp_path / "exam.jsonl"
        path.write_text(json.dumps(test, ensure_ascii=False) + "\n", encoding="utf-8")
        run_synthesis.run({**given, "evaluation_sets": (str(path),)})
    rejected = rows_of(tmp_path / "rows.jsonl.rejected.jsonl")
    assert [one["id"] for one in rejected if one["reason"] == "contaminated"] == [
        f"real_instruction-0-{kept_number:06d}"
    ]


def test_dialogues_of_the_other_kind_are_counted_and_left_out(tmp_path, shared_data):
    path = shared_data / "2_sft_multi_real" / "CMtMedQA_test.json"
    sources = read_sources([path], "real_conversation")
    assert len(sources.dialogues) > 500 and sources.left_out["of the other kind"] > 50
    assert all(len(one.messages) > 2 for one in sources.dialogues)


def test_real_kinds_without_a_source_are_refused(tmp_path):
    with pytest.raises(ValueError, match="real_instruction needs real dialogues: give --source"):
        synthesize.main(
            synthesize.Flags(kind="real_instruction", output=str(tmp_path / "rows.jsonl"))
        )


@pytest.mark.parametrize("kind", ["real_instruction", "real_conversation"])
def test_the_clinic_polishes_its_own_doctors(tmp_path, kind):
    source = tmp_path / "source.jsonl"
    rows = [one.to_json() for one in clinic_dialogues(kind, 60, seed=3)]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    source.write_text(text, encoding="utf-8")
    synthesize.main(
        synthesize.Flags(
            kind=kind, source=(str(source),), output=str(tmp_path / "rows.jsonl"), num_rows=60
        )
    )
    rejected = rows_of(tmp_path / "rows.jsonl.rejected.jsonl")
    assert {one["reason"] for one in rejected} <= {"near duplicate"}
    assert len(rows_of(tmp_path / "rows.jsonl")) + len(rejected) == 60

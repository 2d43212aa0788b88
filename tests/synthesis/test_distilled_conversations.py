"""Distilled conversations of scripted roles: spoiled dialogues are left out, no others are."""

import dataclasses
import json
from collections import Counter

import pytest

from huatuo_jax import synthesize
from huatuo_jax.data.readers import read_dialogues
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation.consultations import (
    ConsultationSettings,
    ConsultationState,
    PatientCase,
    says_goodbye,
)
from huatuo_jax.evaluation.doctor_turns import questions_before_concluding
from huatuo_jax.judge.chat import ChatReply
from huatuo_jax.synthesis.conversations import (
    ConversationMaker,
    TeachingCases,
    doctor_fault,
    patient_fault,
    read_teaching_cases,
)
from huatuo_jax.synthesis.run import MAKERS, SynthesisSettings
from tests.synthesis import run_synthesis
from tests.synthesis.scripted_consultations import (
    FAULTS,
    ScriptedConsultations,
    cases,
    fault_of,
    write_cases,
)
from tests.synthesis.teacher_server import KEY, MODEL, TeacherServer, price_table, some_fault


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def flags(folder, server, count, *, language="zh", **given):
    return {
        "kind": "distilled_conversation",
        "output": str(folder / "rows.jsonl"),
        "teacher": f"openai:{MODEL}",
        "base_url": server.url,
        "prices": price_table(folder / "prices.json"),
        "cases": (write_cases(folder / "cases.json", count, language=language),),
        "languages": (language,),
        "num_rows": count,
        "batch_size": 40,
        "max_exchanges": 6,
        "near_duplicate": 1.0,  # The scripted English is much alike.
        **given,
    }


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("language", ["zh", pytest.param("en", marks=pytest.mark.slow)])
def test_every_spoiled_dialogue_is_left_out_with_its_reason_and_no_other(tmp_path, language):
    with TeacherServer(ScriptedConsultations()) as server:
        run_synthesis.run(flags(tmp_path, server, 120, language=language, attempts=1))
    made = cases(120, language=language)
    planted = {one["id"]: fault_of(one["medical_case"]) for one in made}
    assert set(Counter(planted.values())) == {None, *FAULTS}, "a fault was not planted"
    kept = {one["case_id"] for one in rows_of(tmp_path / "rows.jsonl")}
    assert kept == {name for name, fault in planted.items() if fault is None}
    expected = Counter(FAULTS[fault] for fault in planted.values() if fault is not None)
    rejected = rows_of(tmp_path / "rows.jsonl.rejected.jsonl")
    assert Counter(one["reason"] for one in rejected) == expected
    report = json.loads((tmp_path / "rows.jsonl.report.json").read_text(encoding="utf-8"))
    assert report["yield"] == len(kept) / 120
    assert report["labels"]["language"] == {language: len(kept)}
    assert {name: one["count"] for name, one in report["rejections"].items()} == expected


def test_a_faulty_turn_is_asked_for_again_and_a_dialogue_without_its_end_is_begun_anew(tmp_path):
    with TeacherServer(ScriptedConsultations(once=True, share=1.0)) as server:
        run_synthesis.run(flags(tmp_path, server, 40))
        report = json.loads((tmp_path / "rows.jsonl.report.json").read_text(encoding="utf-8"))
        asked = sum(sum(counts.values()) for counts in report["requests"].values())
        assert report["cost"]["requests"] == len(server.calls) == asked
    # Of a turn by itself nothing is wrong with these: they are seen when the dialogue is over.
    late = {"doctor never says it", "nobody ends it"}
    planted = Counter(fault_of(one["medical_case"], share=1.0) for one in cases(40))
    again = sum(planted[name] for name in late)
    assert len(rows_of(tmp_path / "rows.jsonl")) == 40 > again > 0
    assert report["labels"]["dialogues over its case"] == {"1": 40 - again, "2": again}
    assert report["requests"]["doctor"]["2"] > 0 and report["requests"]["patient"]["2"] > 0


def test_a_request_that_the_server_refuses_is_not_sent_again(tmp_path):
    with TeacherServer(ScriptedConsultations(), fault=lambda number: "451") as server:
        run_synthesis.run(flags(tmp_path, server, 4))
        assert len(server.calls) == 4
    reasons = Counter(one["reason"] for one in rows_of(tmp_path / "rows.jsonl.rejected.jsonl"))
    assert reasons == {"refused by the server": 4}


@pytest.mark.parametrize(
    ("fixed", "asked"),
    [
        ((), ["1-patient-00.1", "1-doctor-01.1", "1-doctor-01.2", "2-patient-00.1"]),
        (("user",), ["1-patient-00.1", "1-doctor-01.1", "1-doctor-01.2", "2-patient-00.1"]),
        (("user", "assistant"), ["1-patient-00.1", "1-doctor-01.1"]),
    ],
)
def test_who_says_the_same_again_is_asked_once(fixed, asked):
    """The doctor speaks English at first; then the patient says goodbye before anything else."""
    maker = ConversationMaker(
        cases=TeachingCases.of_clinic(seed=0), attempts=2, fixed=frozenset(fixed), batch_size=1
    )
    ((_, job),) = maker.batch(0, [])
    replies = iter(["最近有点难受。", *["How long has it been like this?"] * 2])
    step, steps = next(job), []
    with pytest.raises(StopIteration) as end:
        while True:
            steps += [request.step for request in step]
            step = job.send([ChatReply(next(replies, "再见。"), "stop")])
    again = ["2-patient-00.2"] if not fixed else []
    assert steps == asked + again
    (left_out,) = end.value.value
    assert left_out.reason == ("language" if len(asked) == 2 else "early goodbye")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "fixed"),
    [
        ({"teacher": "clinic"}, {"user", "assistant"}),
        ({"teacher": "a_model", "asks": "questions"}, {"user"}),
        ({"teacher": "a_model"}, set()),
        ({"teacher": "a_model", "temperature": 0.0}, {"user", "assistant"}),
    ],
)
def test_the_clinic_and_a_model_at_temperature_0_say_the_same_again(tmp_path, given, fixed):
    settings = SynthesisSettings(**given)
    if not settings.uses_clinic:
        cases_file = write_cases(tmp_path / "cases.json", 2)
        settings = dataclasses.replace(settings, cases=(cases_file,))
    maker, _ = MAKERS["distilled_conversation"]("distilled_conversation", settings, "--")
    assert maker.fixed == fixed


def test_faults_of_the_server_change_nothing(tmp_path):
    clean, faulty = tmp_path / "clean", tmp_path / "faulty"
    clean.mkdir()
    faulty.mkdir()
    with TeacherServer(ScriptedConsultations()) as server:
        run_synthesis.run(flags(clean, server, 12, attempts=2))
        needed = len(server.calls)
    with TeacherServer(ScriptedConsultations(), fault=some_fault(0.3, seed=2)) as server:
        run_synthesis.run(flags(faulty, server, 12, attempts=2))
        assert len(server.delivered()) == needed < len(server.calls)
    for name in ("rows.jsonl", "rows.jsonl.rejected.jsonl"):
        assert (clean / name).read_bytes() == (faulty / name).read_bytes()


def test_rows_load_as_dialogues_that_end_with_the_doctor(tmp_path):
    with TeacherServer(ScriptedConsultations(share=0.0)) as server:
        run_synthesis.run(flags(tmp_path, server, 20))
    reading = read_dialogues(tmp_path / "rows.jsonl")
    dialogues = list(reading)
    assert not reading.errors and len(dialogues) == 20
    for one in dialogues:
        assert one.kind == "distilled_conversation"
        roles = [message.role for message in one.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not any(says_goodbye(message.content) for message in one.messages)
        assert one.extra["diagnosis"] in one.messages[-1].content


def test_a_dry_run_counts_the_turns(tmp_path, capsys):
    with TeacherServer(ScriptedConsultations()) as server:
        run_synthesis.run(flags(tmp_path, server, 40, dry_run=True))
        assert not server.calls
    assert "1 batches of 40 rows" in capsys.readouterr().out


def test_cases_of_published_evaluation_sets_are_read(shared_data):
    found = read_teaching_cases(
        [str(shared_data / "5_gen_benchmark" / "huatuogpt_Med-dialog_100.json")]
    )
    assert len(found) == 67 and all(one.case.description and one.case.diagnosis for one in found)
    assert sum(bool(one.case.diagnoses) for one in found) >= 50


def test_cases_in_another_language_are_left_out_and_counted(tmp_path, capsys):
    both = [*cases(4), *({**one, "id": f"en {one['id']}"} for one in cases(6, language="en"))]
    path = tmp_path / "both.json"
    path.write_text(json.dumps(both, ensure_ascii=False), encoding="utf-8")
    with TeacherServer(ScriptedConsultations(share=0.0)) as server:
        run_synthesis.run(flags(tmp_path, server, 10, language="en", cases=(str(path),)))
        assert "cases: 4 are not in en, and left out" in capsys.readouterr().err
        assert len(rows_of(tmp_path / "rows.jsonl")) == 6
        with pytest.raises(
            ValueError, match="--cases: all 2 are in another language than --languages=en"
        ):
            path.write_text(json.dumps(cases(2), ensure_ascii=False), encoding="utf-8")
            run_synthesis.run(flags(tmp_path, server, 2, language="en", cases=(str(path),)))


def test_conversations_without_cases_are_refused(tmp_path):
    with TeacherServer(ScriptedConsultations()) as server:
        with pytest.raises(ValueError, match="distilled_conversation needs cases: give --cases"):
            run_synthesis.run(flags(tmp_path, server, 5, cases=()))


def test_the_clinic_plays_both_and_its_doctor_asks_first(tmp_path):
    synthesize.main(
        synthesize.Flags(
            kind="distilled_conversation", output=str(tmp_path / "rows.jsonl"), num_rows=40
        )
    )
    rows = rows_of(tmp_path / "rows.jsonl")
    assert len(rows) >= 40
    for row in rows:
        answers = [one["content"] for one in row["messages"] if one["role"] == "assistant"]
        assert questions_before_concluding(answers[:1])[0] > 0
    # The clinic's doctor concludes at once where the first message leaves no doubt.
    reasons = {one["reason"] for one in rows_of(tmp_path / "rows.jsonl.rejected.jsonl")}
    assert reasons <= {"diagnosis leak", "near duplicate"}


def published_turns(shared_data):
    """Turns of two models' dialogues with a played patient, each with what was said before."""
    nobody = PatientCase(id="x", department="", description="", diagnosis="", diagnoses=())
    settings = ConsultationSettings(max_exchanges=99, stop_on_loop=False)
    folder = shared_data / "3_distilled" / "disc_dialogues"
    for path in sorted(folder.glob("*gpt*.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            state = ConsultationState(case=nobody, settings=settings)
            for turn in row["conversation"]:
                role = "user" if turn["role"] == "patient" else "assistant"
                if state.speaker != role:
                    break
                yield role, turn["content"], state
                state = state.add(turn["content"])


def test_published_distilled_dialogues_are_rarely_called_faulty(shared_data):
    """Patients there tell all at once, and older models speak of themselves as models."""
    counts, turns = Counter(), 0
    for role, text, state in published_turns(shared_data):
        turns += 1
        fault = (patient_fault if role == "user" else doctor_fault)(text, state)
        if fault is not None:
            counts[role, fault[0]] += 1
    print(turns, counts)
    assert turns > 2_000
    assert counts["user", "role flip"] + counts["assistant", "role flip"] <= 0.002 * turns
    assert counts["user", "refusal"] == 0
    assert counts["user", "echo"] + counts["assistant", "echo"] <= 0.002 * turns
    assert counts["user", "language"] + counts["assistant", "language"] == 0


CASE = PatientCase(
    id="one",
    department="皮肤科",
    description="皮肤起红斑三天。",
    diagnosis="荨麻疹",
    diagnoses=(("荨麻疹",),),
)


def state_of(*texts):
    roles = ("user", "assistant")
    messages = tuple(Message(roles[place % 2], text) for place, text in enumerate(texts))
    return ConsultationState(case=CASE, settings=ConsultationSettings(), messages=messages)


def test_the_diagnosis_may_be_named_once_the_doctor_has_asked():
    first = state_of("皮肤起红斑。")
    assert doctor_fault("考虑荨麻疹，先抹药。", first)[0] == "diagnosis leak"
    assert doctor_fault("可以排除荨麻疹，请问痒不痒？", first) is None
    asked = state_of("皮肤起红斑。", "请问痒不痒，多久了？", "很痒，三天了。")
    assert doctor_fault("考虑荨麻疹，先抹药。", asked) is None


def test_the_patient_may_name_what_the_doctor_has_named():
    asked = state_of("皮肤起红斑。", "请问痒不痒，多久了？")
    assert patient_fault("很痒，是荨麻疹吗？", asked)[0] == "diagnosis leak"
    told = state_of("皮肤起红斑。", "请问痒不痒？", "很痒。", "考虑荨麻疹，建议抹药。")
    assert patient_fault("荨麻疹会传染给家里人吗？", told) is None


def test_the_clinic_makes_more_conversations_for_the_same_output(tmp_path):
    output = tmp_path / "rows.jsonl"
    given = {"kind": "distilled_conversation", "output": str(output), "batch_size": 8}
    synthesize.main(synthesize.Flags(**given, num_rows=8))
    first = rows_of(output)
    synthesize.main(synthesize.Flags(**given, num_rows=24))
    assert rows_of(output)[: len(first)] == first and len(rows_of(output)) >= 24

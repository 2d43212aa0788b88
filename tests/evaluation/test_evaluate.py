"""The command `huatuo evaluate`, with models, patients and judges behind scripted servers."""

import json
import os
import pathlib
import signal
import sys
import time

import pytest

from huatuo_jax import evaluate
from huatuo_jax.core import command_line
from huatuo_jax.core.statistics import cohen_kappa
from huatuo_jax.evaluation import lexical
from huatuo_jax.evaluation.opening import short_names
from huatuo_jax.evaluation.session import Session
from huatuo_jax.evaluation.suite_settings import Files
from huatuo_jax.judge.config import JudgeConfig
from huatuo_jax.judge.server import KEY_VARIABLE
from huatuo_jax.training.loop import INTERRUPTED_EXIT_CODE
from tests.evaluation import killed_runs, planted_judge
from tests.evaluation.killed_runs import calls_without_an_end, kept_replies
from tests.evaluation.planted_judge import NAMES, points
from tests.evaluation.scripted_server import KEY, ScriptedServer

MODELS = tuple(f"openai:{name}" for name in NAMES)
EVALUATE = """
from huatuo_jax import cli, evaluate

def run():
    cli.run("evaluate")
"""
start = pytest.fixture(killed_runs.start)
JUDGED = {"single_turn", "multi_turn", "clinical", "healthbench"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return str(path)


def run(folder, server=None, **fields):
    """The results of an evaluation of the scripted models."""
    if server is not None:
        fields.setdefault("model", MODELS)
        if set(fields["suite"]) & JUDGED:
            fields.setdefault("judge", JudgeConfig(base_url=server.url, model="judge"))
        if any(name.startswith("openai:") for name in fields["model"]):
            fields.setdefault("base_url", server.url)
    evaluate.main(evaluate.Flags(output=str(folder), **fields))
    return json.loads((folder / evaluate.RESULTS_FILE).read_text("utf-8"))


def kuake(folder, count):
    path = write_json(folder / "kuake.json", planted_judge.questions(count))
    return Files(kuake_qic=path)


def test_a_planted_judges_wins_ties_losses_and_bias_are_recovered(tmp_path):
    count = 160
    with planted_judge.serve() as server:
        result = run(tmp_path / "out", server, suite=("single_turn",), files=kuake(tmp_path, count))
        paid = server.paid
    (compared,) = result["suites"]["single_turn"]["comparisons"]
    figures, rows = compared["figures"], planted_judge.questions(count)
    verdicts = [points(row["query"]) for row in rows]
    overall = figures["overall"]
    failed = overall["failed"]
    # A verdict is lost only where three replies to one order are prose: 0.8 % of the orders.
    assert 0 <= failed <= 0.05 * count
    assert sum(figures["unparsed"].values()) >= failed
    wins = sum(sum(one) > 1 for one in verdicts)
    losses = sum(sum(one) < 1 for one in verdicts)
    assert wins - failed <= overall["wins"] <= wins
    assert losses - failed <= overall["losses"] <= losses
    assert overall["wins"] + overall["ties"] + overall["losses"] + failed == count
    disagree = sum(one in ((1.0, 0.0), (0.0, 1.0)) for one in verdicts)
    assert disagree - failed <= figures["orders_disagree"] <= disagree
    looks = 1 - planted_judge.FIRST_ALWAYS
    of_longer = looks * planted_judge.LONGER_ALWAYS
    planted_share = (
        planted_judge.FIRST_ALWAYS / 2
        + of_longer / 2  # Each model's response is the longer one on half of the questions.
        + (looks - of_longer) * (planted_judge.WIN + planted_judge.TIE / 2)
    )
    assert overall["share"]["low"] < planted_share < overall["share"]["high"]
    bias = figures["position_bias"]
    assert bias["low"] < planted_judge.FIRST_ALWAYS / 2 < bias["high"]
    length_bias = figures["length_bias"]
    assert 0 < length_bias["low"] < of_longer / 2 < length_bias["high"]
    balanced = figures["length_balanced_share"]
    assert balanced["low"] < planted_share < balanced["high"]
    longer = [planted_judge.longer(row["query"]) for row in rows]
    assert length_bias["num_pairs"] >= sum(one is not None for one in longer) - failed
    # Each order once, each prose reply at most twice more, each response of both models once.
    assert 4 * count < paid < 4 * count + 2 * count * 0.4
    assert set(figures["groups"]) == {row["label"] for row in rows}
    records = (tmp_path / "out" / "records" / "single_turn_verdicts.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in records.splitlines()]
    assert len(lines) == 2 * count and {len(line["replies"]) for line in lines} == {1, 2, 3}
    assert all("<think>" not in line["judge_prompt"][-1]["content"] for line in lines)
    page = (tmp_path / "out" / evaluate.PAGE_FILE).read_text("utf-8")
    assert page.count("<polygon") == 2 and "治疗方案" in page


def test_a_second_run_pays_for_nothing(tmp_path):
    with planted_judge.serve(faults=0.0) as server:
        given = {"suite": ("single_turn",), "files": kuake(tmp_path, 12)}
        first = run(tmp_path / "out", server, **given)
        paid = server.paid
        assert paid == 12 * 4
        assert run(tmp_path / "out", server, **given) == first and server.paid == paid
        run(tmp_path / "out", server, **given | {"limit": 5})
        run(tmp_path / "out", server, **given, names=("one", "other"))
        assert server.paid == paid


@pytest.mark.slow
@pytest.mark.parametrize(
    ("concurrency", "kill_at"), [(1, (7, 20, 33, 41, 48)), (4, (9, 22, 33, 41, 50))]
)
def test_killed_five_times_it_pays_again_for_replies_lost_under_way_alone(
    tmp_path, start, concurrency, kill_at
):
    """A killed run of one request at a time loses none, as it is killed before each is answered."""
    count, lost_at_most = 12, (concurrency - 1) * len(kill_at)
    planted, out = planted_judge.Planted(), tmp_path / "out"

    def reply(body, number):
        process.kill_at(number in kill_at)
        time.sleep(0.02)
        return planted.reply(body, number)

    def forget_lost():
        while server.under_way > 1:  # The request at which the run was killed waits.
            time.sleep(0.01)
        kept = kept_replies(out)
        with planted.lock:
            planted.seen = {request: kept[request] for request in planted.seen}

    with ScriptedServer(reply) as server:
        files = kuake(tmp_path, count)
        process = start(
            EVALUATE,
            [
                *(f"--model={','.join(MODELS)}", "--suite=single_turn"),
                *(f"--concurrency={concurrency}", f"--base_url={server.url}"),
                *(f"--judge.base_url={server.url}", "--judge.model=judge"),
                *(f"--files.kuake_qic={files.kuake_qic}", f"--output={out}"),
            ],
        )
        codes = process.run_while_killed(forget_lost)
        assert codes == [-signal.SIGKILL] * len(kill_at) + [0]
        paid, kept = server.paid, kept_replies(out)
    with planted_judge.serve() as server:
        whole = run(tmp_path / "whole", server, suite=("single_turn",), files=files)
        unbroken = server.paid
    assert kept == kept_replies(tmp_path / "whole") and kept.total() == unbroken
    assert unbroken > 4 * count  # The faults were asked about again.
    lost = paid - unbroken
    assert 0 <= lost <= lost_at_most
    # Every kill's calls under way are on record, whether the server answered them or not.
    assert lost + len(kill_at) <= calls_without_an_end(out) <= concurrency * len(kill_at)
    broken = json.loads((out / evaluate.RESULTS_FILE).read_text("utf-8"))
    assert broken["suites"] == whole["suites"]
    # The results tell of them, too.
    unknown, known = (
        sum(one["unknown_requests"] for one in found["calls"].values()) for found in (broken, whole)
    )
    assert (unknown, known) == (calls_without_an_end(out), 0)
    assert sum(one["requests"] for one in whole["calls"].values()) == unbroken


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_it_waits_for_the_replies_under_way_and_loses_none(tmp_path, start, number):
    count, planted, out = 8, planted_judge.Planted(faults=0.0), tmp_path / "out"

    def reply(body, sent):
        if sent == 21:
            os.kill(process.child, number)
        time.sleep(0.05)
        return planted.reply(body, sent)

    with ScriptedServer(reply) as server:
        files = kuake(tmp_path, count)
        process = start(
            EVALUATE,
            [
                *(f"--model={','.join(MODELS)}", "--suite=single_turn", "--concurrency=4"),
                *(f"--base_url={server.url}", f"--judge.base_url={server.url}"),
                *("--judge.model=judge", f"--files.kuake_qic={files.kuake_qic}"),
                f"--output={out}",
            ],
        )

        def nothing_is_lost():
            assert kept_replies(out).total() == server.paid

        codes = process.run_while_killed(nothing_is_lost)
        assert codes == [INTERRUPTED_EXIT_CODE] and 21 < server.paid < 4 * count
        codes = process.run_while_killed(nothing_is_lost)
        assert codes == [0] and server.paid == 4 * count and calls_without_an_end(out) == 0


def test_the_agreement_of_two_judges_is_cohens_kappa_of_their_outcomes(tmp_path):
    planted = planted_judge.Planted(faults=0.0)

    def reply(body, number):
        if body["model"] != "other":
            return planted.reply(body, number)
        return json.dumps({"reason": "因为", "better": 1})  # Always the first: all ties.

    with ScriptedServer(reply) as server:
        result = run(
            tmp_path / "out",
            server,
            suite=("single_turn",),
            files=kuake(tmp_path, 20),
            second_judge=JudgeConfig(base_url=server.url, model="other"),
        )
    (compared,) = result["suites"]["single_turn"]["comparisons"]
    verdicts = [sum(points(row["query"])) for row in planted_judge.questions(20)]
    labels = ["win" if one > 1 else "loss" if one < 1 else "tie" for one in verdicts]
    assert compared["second_judge"]["agreement"] == {
        "kappa": pytest.approx(cohen_kappa(labels, ["tie"] * 20)),
        "agreement": pytest.approx(labels.count("tie") / 20),
        "num_contests": 20,
    }
    assert result["second_judge"]["judge"] == "other"


CASES = [
    {"id": name, "medical_case": f"病例{name}：手背起红疹三天，很痒。", "Department": department}
    | {"doctor_diagnosis": "考虑湿疹。"}
    for name, department in (("flip", "皮肤科"), ("leak", "皮肤科"), ("loop", "内科"))
]


def scripted_patient(body, number):
    """A patient with one fault a case, doctors that ask and then conclude, a judge."""
    messages = body["messages"]
    text, turn = messages[0]["content"], sum(one["role"] == "assistant" for one in messages)
    if body["model"] in NAMES:
        asks = ("有没有发热？", "什么时候开始的？", "以前有没有过？", "碰过洗衣粉吗？")
        count = sum(one["role"] == "user" for one in messages)
        if count > len(asks):
            return f"{body['model']}第{count}次说：可能是湿疹，建议外用药膏。"
        return asks[count - 1] if body["model"] == NAMES[0] else f"请问{asks[count - 1]}"
    if "病例flip" in text and "患者" in text:
        return (
            "手背起红疹，很痒。",
            "建议您尽快去医院检查，请问您有没有过敏史？",
            "谢谢医生，再见。",
        )[min(turn, 2)]
    if "病例leak" in text and "患者" in text:
        return ("手背起红疹，很痒，我这是湿疹。", "没有发热。", "谢谢医生，再见。")[min(turn, 2)]
    if "病例loop" in text and "患者" in text:
        return "手背上起了一片红疹，特别痒，晚上睡不着觉。"
    return json.dumps({"reason": "因为", "better": 1})


def test_a_patient_that_flips_roles_leaks_and_never_ends_is_caught(tmp_path):
    files = Files(med_dialog=write_json(tmp_path / "cases.json", CASES))
    with ScriptedServer(scripted_patient) as server:
        given = {"suite": ("multi_turn",), "files": files}
        result = run(tmp_path / "out", server, **given)
        paid = server.paid
        assert run(tmp_path / "out", server, **given) == result and server.paid == paid
    found = result["suites"]["multi_turn"]
    for name in NAMES:
        outcomes = found["models"][name]["outcomes"]
        assert outcomes["faults"] == {
            "role_flip by user": 1,
            "leak by user": 1,
            "loop by user": 1,
        }
        assert outcomes["ends"] == {"goodbye": 2, "loop": 1} and outcomes["spoiled"] == 2
        assert outcomes["consultations"] == 3 and found["models"][name]["left_out"] == []
        assert found["models"][name]["without_spoiled"]["consultations"] == 1
    (compared,) = found["comparisons"]
    assert compared["figures"]["position_bias"]["value"] == 0.5
    rows = (tmp_path / "out" / "records" / "multi_turn.jsonl").read_text("utf-8").splitlines()
    kinds = {
        (row["id"], fault["kind"])
        for row in map(json.loads, rows)
        for fault in row["outcome"]["faults"]
    }
    assert kinds == {("flip", "role_flip"), ("leak", "leak"), ("loop", "loop")}


def test_the_clinics_patient_needs_no_judge_and_ends_with_goodbye(tmp_path):
    def doctor(body, number):
        turns = sum(one["role"] == "user" for one in body["messages"])
        return "还有别的症状吗？" if turns == 1 else "考虑是感冒，建议多喝水，多休息。"

    with ScriptedServer(doctor) as server:
        result = run(
            tmp_path / "out",
            server,
            model=("openai:doctor",),
            judge=JudgeConfig(),
            suite=("multi_turn", "clinic"),
            patient="clinic",
            clinic_cases=6,
        )
    found = result["suites"]["multi_turn"]["models"]["doctor"]["outcomes"]
    assert found["ends"] == {"goodbye": 6} and found["exchanges"]["value"] == 2.0
    clinic = result["suites"]["clinic"]["models"]["doctor"]["figures"]
    shares = [clinic[f"diagnosis_{name}"] for name in ("right", "plausible", "wrong", "absent")]
    assert sum(one["value"] for one in shares) == pytest.approx(1.0)
    assert clinic["diagnosis_absent"]["value"] == pytest.approx(
        sum("还有别的" in text for text in replies(tmp_path / "out", "clinic")) / 6
    )


def replies(folder, suite):
    text = (folder / "records" / f"{suite}.jsonl").read_text("utf-8")
    return [json.loads(line)["response"] for line in text.splitlines()]


CLINICAL = [
    {
        "id": str(number),
        "title": "肺炎",
        "description": f"患者{number}，发热三天。",
        "QA_pairs": [
            {"question": "诊断是什么？", "solution": "肺炎"},
            {"question": "如何治疗？", "solution": "抗感染治疗"},
        ],
    }
    for number in range(3)
]
RUBRIC = [
    {
        "prompt_id": f"r{number}",
        "prompt": [{"role": "user", "content": f"chest pain {number}"}],
        "rubrics": [
            {"criterion": "Sends to emergency care", "points": 8, "tags": ["axis:accuracy"]},
            {"criterion": "Is vague", "points": -4, "tags": ["axis:communication_quality"]},
        ],
        "example_tags": ["theme:emergency"],
    }
    for number in range(4)
]


def grader(body, number):
    """Scores clinical responses 3, grants each first criterion, and says prose to one request."""
    text = body["messages"][-1]["content"]
    if body["model"] in NAMES:
        return f"{body['model']}: {text[-20:]}"
    if "fluency" in text:
        return json.dumps(
            {"reason": "好"}
            | dict.fromkeys(("fluency", "relevance", "completeness", "proficiency"), 3)
        )
    if "chest pain 2" in text and "Is vague" in text:
        return "I cannot tell."
    return json.dumps({"explanation": "", "criteria_met": "[8]" in text})


@pytest.mark.parametrize("history", ["reference", "model"])
def test_clinical_and_healthbench_count_what_was_never_judged(tmp_path, history):
    rows = tmp_path / "rubrics.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in RUBRIC), "utf-8")
    files = Files(cmb_clin=write_json(tmp_path / "clin.json", CLINICAL), healthbench=str(rows))
    with ScriptedServer(grader) as server:
        result = run(
            *(tmp_path / "out", server),
            suite=("clinical", "healthbench"),
            files=files,
            history=history,
        )
        asked = [one["messages"] for one in server.requests]
    for name in NAMES:
        clinical = result["suites"]["clinical"]["models"][name]
        assert clinical["overall"]["value"] == 3.0 and clinical["num_unjudged"] == 0
        bench = result["suites"]["healthbench"]["models"][name]
        assert bench["score"]["value"] == 1.0 and bench["unjudged"] == {"r2": 1}
        assert bench["score_if_all_were_judged"] == [pytest.approx(3.5 / 4), 1.0]
    vague = [
        one for one in asked if "chest pain 2" in one[-1]["content"] and "Is vague" in str(one)
    ]
    assert len(vague) == 3 * len(NAMES)  # Asked three times of each model's response.
    second = [one for one in asked if len(one) == 3 and one[0]["role"] == "user"]
    given = {one[1]["content"] for one in second if one[-1]["content"] == "如何治疗？"}
    assert given == (
        {"肺炎"} if history == "reference" else {one for one in given if one.startswith(NAMES)}
    )
    assert len(given) == (1 if history == "reference" else 6 if history == "model" else 0)


def test_lexical_figures_are_those_of_the_responses_without_their_thoughts(tmp_path):
    path = tmp_path / "26m.jsonl"
    rows = [{"questions": f"问题{n}", "answers": [f"多休息，多喝水。{n}"]} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def reply(body, number):
        question = body["messages"][-1]["content"]
        return f"<think>嗯</think>多休息，多喝水。{question[-1]}"

    with ScriptedServer(reply) as server:
        result = run(
            *(tmp_path / "out", server),
            suite=("lexical",),
            judge=JudgeConfig(),
            files=Files(huatuo26m=str(path)),
            conventions=True,
            training_data=(str(path),),
        )
    one = result["suites"]["lexical"]["sets"]["huatuo26m"]["models"][NAMES[0]]
    assert one["figures"]["BLEU-4"]["value"] == pytest.approx(100.0)
    assert len(one["conventions"]) > 10
    found = result["contamination"]
    # The questions with their answers are in the training texts, and too short to tell.
    assert found["num_training_texts"] == 4 and found["suites"]["lexical"]["num_unchecked"] == 4


def test_a_dry_run_sends_and_writes_nothing_and_counts_what_a_run_asks(tmp_path, capsys):
    with planted_judge.serve(faults=0.0) as server:
        given = {"suite": ("single_turn",), "files": kuake(tmp_path, 10)}
        flags = evaluate.Flags(
            model=MODELS,
            output=str(tmp_path / "out"),
            base_url=server.url,
            judge=JudgeConfig(base_url=server.url, model="judge"),
            dry_run=True,
            **given,
        )
        evaluate.main(flags)
        told = capsys.readouterr().out
        assert server.requests == [] and not (tmp_path / "out").exists()
        assert "single_turn: 10 responses of jia" in told
        assert "verdicts of judge: 20 requests, about" in told
        run(tmp_path / "out", server, **given)
        evaluate.main(flags)
        assert "verdicts of judge: 0 requests" in capsys.readouterr().out


def test_doctors_rate_a_blind_page_and_their_files_are_read_back(tmp_path):
    files, out = kuake(tmp_path, 6), tmp_path / "out"
    with planted_judge.serve(faults=0.0) as server:
        given = {"suite": ("single_turn",), "files": files}
        run(out, server, **given, human=True)
        key = json.loads((out / "human" / "human_key.json").read_text("utf-8"))
        ratings = []
        for rater in ("a", "b"):
            rows = [
                {"item": item["item"], "note": "", "safety": "none"}
                | dict.fromkeys(
                    ("diagnosis", "treatment", "knowledge"),
                    "second" if item["swapped"] else "first",
                )
                for item in key["items"]
            ]
            value = {"format": "huatuo-human-ratings-1", "set": key["set"], "rater": rater}
            ratings.append(write_json(tmp_path / f"{rater}.json", value | {"ratings": rows}))
        found = run(out, server, **given, ratings=tuple(ratings))["suites"]["single_turn"]["human"]
        (compared,) = found["ratings"]["comparisons"]
        assert compared["systems"] == list(NAMES)
        assert compared["criteria"]["overall"]["win_share"]["value"] == 1.0
        assert found["ratings"]["judge"]["majority"]["num_items"] == 6
        with pytest.raises(ValueError, match="holds a page of other responses"):
            run(out, server, **given, human=True, limit=3)


def refused(folder, server, **fields):
    with pytest.raises(ValueError) as error:
        run(folder / "out", server, **fields)
    assert server.requests == [] and not (folder / "out" / evaluate.RESULTS_FILE).exists()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_cannot_be_is_one_line_before_anything_is_sent(tmp_path):
    none = JudgeConfig()
    files = kuake(tmp_path, 4)
    broken = Files(kuake_qic=write_json(tmp_path / "b.json", [{"id": "1", "label": "x"}]))
    absent = Files(kuake_qic=str(tmp_path / "absent.json"))
    with planted_judge.serve() as server:
        for said, fields in {
            "unknown suite 'exam'; there are lexical, exams,": {"suite": ("exam",)},
            "single_turn needs its set: give --files.kuake_qic": {"suite": ("single_turn",)},
            "absent.json: there is no such file": {"suite": ("single_turn",), "files": absent},
            "b.json:1: query is None; it should be text": {
                "suite": ("single_turn",),
                "files": broken,
            },
            "single_turn needs a judge: give --judge.base_url": {
                "suite": ("single_turn",),
                "files": files,
                "judge": none,
            },
            "clinical needs its set": {"suite": ("clinical",)},
            "healthbench needs a judge": {
                "suite": ("healthbench",),
                "files": Files(healthbench=files.kuake_qic),
                "judge": none,
            },
            "--patient=judge needs a model to play the patient": {
                "suite": ("multi_turn",),
                "files": Files(med_dialog=files.kuake_qic),
                "judge": JudgeConfig(offline="rubric"),
            },
            "lexical needs a set: give one of --files.cmedqa2": {"suite": ("lexical",)},
            "--exam_by=likelihood needs a saved model": {
                "suite": ("exams",),
                "exam_by": ("likelihood",),
            },
            "--human and --ratings compare two models": {
                "suite": ("single_turn",),
                "files": files,
                "human": True,
                "model": MODELS[:1],
            },
            "--judge.structured decides nothing here": {
                "suite": ("single_turn",),
                "files": files,
                "judge": JudgeConfig(base_url=server.url, model="judge", structured="json_object"),
            },
            "--names has 1 for 2 models": {"suite": ("clinic",), "names": ("one",)},
            "train.jsonl: there is no such file": {
                "suite": ("clinic",),
                "training_data": ("train.jsonl",),
            },
        }.items():
            assert said in refused(tmp_path, server, **fields)


@pytest.mark.parametrize("library", ["nltk.translate.bleu_score", "jieba"])
def test_a_library_that_the_lexical_metrics_lack_is_told_before_anything_is_sent(
    tmp_path, monkeypatch, library
):
    rows = tmp_path / "26m.jsonl"
    rows.write_text(json.dumps({"questions": "头痛", "answers": ["多休息"]}) + "\n", "utf-8")
    lexical._jieba_words.cache_clear()
    monkeypatch.setitem(sys.modules, library, None)
    tokenizer = "jieba" if library == "jieba" else "characters"
    given = {"suite": ("lexical",), "tokenizer": tokenizer, "files": Files(huatuo26m=str(rows))}
    with planted_judge.serve() as server:
        told = refused(tmp_path, server, **given)
    assert told == f"the lexical metrics need {library}: pip install 'huatuo_jax[evaluation]'"


def test_flags_of_sections_have_the_sections_names():
    flags = command_line.parse(
        evaluate.Flags,
        [
            *("--model=a,b", "--suite=clinic", "--output=o", "--judge.base_url=http://j/v1"),
            *("--judge.model=m", "--files.apollo=x,y", "--examples.cmb=z"),
        ],
        name="evaluate",
        flat=False,
    )
    assert flags.model == ("a", "b") and flags.judge.model == "m"
    assert flags.files.apollo == ("x", "y") and flags.examples.cmb == "z"
    with pytest.raises(ValueError, match="did you mean --judge.model"):
        command_line.parse(evaluate.Flags, ["--judge.modle=m"], name="evaluate", flat=False)


def test_models_are_named_by_the_ends_of_their_paths_that_differ():
    assert short_names(["/runs/sft/model", "/runs/ppo/model"]) == [
        "sft/model",
        "ppo/model",
    ]
    assert short_names(["openai:gpt", "/runs/model"]) == ["gpt", "model"]


def test_the_limit_draws_by_the_seed_and_keeps_the_order():
    def drawn(seed):
        return Session({}, pathlib.Path("x"), seed=seed, limit=5).limited(range(100), "set")

    assert drawn(0) == sorted(drawn(0)) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 5

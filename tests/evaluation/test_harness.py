"""lm-evaluation-harness asks our model, and has the answers of torch and of our own evaluator."""

import collections
import csv
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CachingLM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from huatuo_jax.clinic.files import TOKENIZER
from huatuo_jax.data.records import Message
from huatuo_jax.evaluation import exam_prompts, exam_sets
from huatuo_jax.evaluation.exam_scores import score_exam
from huatuo_jax.evaluation.harness import TASKS, HuatuoLM
from huatuo_jax.evaluation.harness.model import ChatPrompt
from huatuo_jax.generation.requests import Answer, Usage
from tests.hf import tiny_checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
POSITIONS = 2048
# Pairs as tasks make them: a gap on either side, no context, a text that has BOS already.
PAIRS = (
    ("头痛三天了，怎么办？", "多喝水"),
    ("问题\nA. 甲\nB. 乙\n答案：", " A"),
    ("问题\nA. 甲\nB. 乙\n答案：", " B"),
    ("问题\nA. 甲\nB. 乙\n答案： ", "A"),
    ("The answer is  ", "B"),
    ("", "咳嗽"),
    ("<s>发热", "两天"),
)


def save(folder, **sizes):
    """A random Qwen3 with the clinic's tokenizer, in Hugging Face's form.

    Not a Qwen2: beside one, transformers takes any tokenizer for Qwen2's, which loses the Chinese.
    """
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": 2048, "max_position_embeddings": POSITIONS, **ids, **sizes}
    model = tiny_checkpoints.transformers_model("qwen3", **sizes)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    for one in (model, tokenizer):
        one.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def model(folder, on_one_device):
    return HuatuoLM(folder, max_length=96)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def request(*arguments, kind="loglikelihood"):
    return Instance(kind, doc={}, arguments=arguments, idx=0, metadata=("task", 0, 1))


def log_probs(theirs, token_ids):
    """Of each next token, by torch in float64, `[T, V]`."""
    with torch.no_grad():
        logits = theirs(torch.tensor([token_ids])).logits[0].double()
    return torch.log_softmax(logits, -1).numpy()


def by_torch(theirs, before, after):
    values_TV = log_probs(theirs, [*before, *after][:-1])[len(before) - 1 :]
    greedy = values_TV.argmax(-1).tolist() == list(after)
    return values_TV[np.arange(len(after)), after].sum(), greedy


def tokens(tokenizer, context, continuation):
    """What lm-evaluation-harness makes of a pair for a model of transformers."""
    if not context:
        return [1], tokenizer.encode(continuation, add_special_tokens=False)
    special = not context.startswith("<s>")
    spaces = len(context) - len(context.rstrip())
    stripped = context[: len(context) - spaces]
    before = tokenizer.encode(stripped, add_special_tokens=special)
    both = tokenizer.encode(context + continuation, add_special_tokens=special)
    return before, both[len(before) :]


def test_the_harness_knows_the_model_by_name():
    assert get_model("huatuo") is HuatuoLM


def test_likelihoods_are_those_of_torch(model, theirs):
    found = model.loglikelihood([request(*pair) for pair in PAIRS])
    for pair, (log_prob, is_greedy) in zip(PAIRS, found, strict=True):
        before, after = tokens(model.tokenizer, *pair)
        wanted, greedy = by_torch(theirs, before, after)
        assert log_prob == pytest.approx(wanted, abs=1e-4), pair
        assert is_greedy == greedy


def test_the_greedy_continuation_is_greedy(model, theirs):
    context = "头痛三天了，怎么办？"
    before = model.tokenizer.encode(context)
    best = int(log_probs(theirs, before)[-1].argmax())
    scored = model._score([(before, [best]), (before, [best, 7]), (before, [(best + 1) % 2000])])
    wanted = [by_torch(theirs, before, each) for each in ([best], [best, 7], [(best + 1) % 2000])]
    assert [one.is_greedy for one in scored] == [greedy for _, greedy in wanted]
    assert scored[0].is_greedy and not scored[2].is_greedy


def test_a_context_is_scored_once_for_all_its_continuations(model, monkeypatch):
    given = []
    score = model._scorer.score
    monkeypatch.setattr(model._scorer, "score", lambda asked: given.extend(asked) or score(asked))
    pairs = [("头痛，", "甲"), ("咳嗽，", "甲"), ("头痛，", "乙"), ("头痛，", "甲")]
    found = model.loglikelihood([request(*pair) for pair in pairs])
    assert [len(one.continuations) for one in given] == [2, 1]
    assert found[0] == found[3] != found[2]


def test_a_context_that_is_too_long_loses_its_first_tokens_and_it_is_logged(model, theirs, caplog):
    context = "头痛三天了，怎么办？" * 20
    ((log_prob, _),) = model.loglikelihood([request(context, "多喝水")])
    before, after = tokens(model.tokenizer, context, "多喝水")
    kept = before[len(before) + len(after) - model.max_length - 1 :]
    assert len(kept) < len(before)
    assert log_prob == pytest.approx(by_torch(theirs, kept, after)[0], abs=1e-4)
    assert "1 of 1 requests are longer than the 96 tokens" in caplog.text


@pytest.mark.parametrize("repeats", [1, 60])
def test_whole_texts_are_scored_in_windows(model, theirs, repeats):
    text = "头痛三天了，怎么办？" * repeats
    (found,) = model.loglikelihood_rolling([request(text, kind="loglikelihood_rolling")])
    token_ids = model.tokenizer.encode(text)
    assert (len(token_ids) > 3 * model.max_length) == (repeats > 1)
    whole, wanted, done = [1, *token_ids], 0.0, 0
    while done < len(token_ids):  # Each window is full, and scores what none before it scored.
        end = min(done + model.max_length, len(token_ids))
        start = max(0, end - model.max_length)
        values_TV = log_probs(theirs, whole[start:end])
        wanted += sum(values_TV[place - start, token_ids[place]] for place in range(done, end))
        done = end
    assert found == pytest.approx(wanted, abs=1e-3)


def test_responses_are_greedy_up_to_a_stop_string(model, theirs):
    context = "头痛三天了，怎么办？"
    ids = model.tokenizer.encode(context)
    for _ in range(12):
        ids.append(int(log_probs(theirs, ids)[-1].argmax()))
    text = model.tokenizer.decode(ids[-12:], skip_special_tokens=True)
    stop = text[4:6]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    asked = [
        request(context, settings, kind="generate_until"),
        request(context, settings | {"until": [stop]}, kind="generate_until"),
    ]
    assert model.generate_until(asked) == [text, text[: text.index(stop)]]


def test_repeated_requests_are_sampled_anew_and_a_seed_repeats_them_all(model):
    asked = [request("头痛，", {"do_sample": True, "max_gen_toks": 8}, kind="generate_until")] * 3
    found = model.generate_until(asked)
    assert len(set(found)) == 3
    assert model.generate_until(asked) == found


def test_a_setting_that_is_not_supported_is_named(model):
    asked = request("头痛", {"until": [], "num_beams": 4}, kind="generate_until")
    with pytest.raises(ValueError, match="generation setting num_beams=4 is not supported"):
        model.generate_until([asked])
    with pytest.raises(ValueError, match="max_gen_toks=96 leaves no room"):
        model.generate_until([request("头痛", {"max_gen_toks": 96}, kind="generate_until")])
    with pytest.raises(ValueError, match="continuation '' has 0 tokens"):
        model.loglikelihood([request("头痛", "")])


def test_fields_that_are_invalid_are_named(folder):
    with pytest.raises(ValueError, match="max_length=4096 must lie between 2 and"):
        HuatuoLM(folder, max_length=4096)
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        HuatuoLM(folder, slots=0)


DIALOGUE = [
    {"role": "user", "content": "头痛"},
    {"role": "assistant", "content": "几天了？"},
    {"role": "user", "content": "“三天”</s>"},
]


def test_chats_are_tokenised_by_the_template(model):
    template, tokenizer = model._saved.template, model.tokenizer
    assert template.name == "huatuogpt"
    prompt = model.apply_chat_template(DIALOGUE)
    messages = [Message(one["role"], one["content"]) for one in DIALOGUE]
    assert prompt == template.text(messages, tokenizer)
    # Its text alone gives other ids, for one as the user's </s> would become EOS.
    assert tokenizer.encode(prompt) != template.prompt(messages, tokenizer)
    ((before, after),) = model._encode_pairs([(prompt, "多喝水")])
    assert before == template.prompt(messages, tokenizer)
    whole = template.render([*messages, Message("assistant", "多喝水")], tokenizer).token_ids
    assert (before + after) == whole[: len(before + after)]
    assert tokenizer.decode(after) == "多喝水"


def test_a_response_that_has_begun_is_continued(model):
    begun = [*DIALOGUE, {"role": "assistant", "content": "答案："}]
    prompt = model.apply_chat_template(begun, add_generation_prompt=False)
    assert prompt.endswith("<HuatuoGPT>：答案：")
    ((before, after),) = model._encode_pairs([(prompt, "A")])
    assert model.tokenizer.decode([*before, *after]).endswith("<HuatuoGPT>：答案：A")
    assert 2 not in before[-8:]  # The response has not ended.


def test_a_chat_keeps_its_ids_in_the_harness_and_in_its_cache(model):
    prompt = model.apply_chat_template(DIALOGUE)
    back = pickle.loads(pickle.dumps(prompt))
    assert (type(back), back, back.token_ids) == (ChatPrompt, prompt, prompt.token_ids)
    assert back.messages == prompt.messages


@pytest.mark.parametrize(("end", "wanted"), [([2], "多喝水"), ([], "多喝水 ")])
def test_responses_in_a_chat_have_what_the_template_writes_around_them_taken_off(
    model, monkeypatch, end, wanted
):
    """HuatuoGPT's writes a space before EOS; without EOS the response may still go on."""
    prompt = model.apply_chat_template(DIALOGUE)
    token_ids = [*model.tokenizer.encode("多喝水 ", add_special_tokens=False), *end]
    answer = Answer(
        request_index=0,
        answer_index=0,
        token_ids=token_ids,
        text="多喝水 ",
        log_probs=[0.0] * len(token_ids),
        sampling_log_probs=[0.0] * len(token_ids),
        finish_reason="stop" if end else "length",
        usage=Usage(1, len(token_ids)),
    )
    asked = []
    monkeypatch.setattr(
        model._engines, "answer", lambda made: asked.extend(made) or [[answer]] * len(made)
    )
    settings = {"until": ["问："], "max_gen_toks": 9}
    requests = [request(one, settings, kind="generate_until") for one in (prompt, "头痛")]
    assert model.generate_until(requests) == [wanted, "多喝水 "]
    assert asked[0].prompt_token_ids == prompt.token_ids
    assert asked[0].sampling.stop_strings == ("问：",)
    assert 2 in asked[0].sampling.stop_token_ids


def test_the_template_of_a_run_is_recorded_and_another_is_refused(model):
    assert "<HuatuoGPT>：" in model.chat_template(True)
    assert model.chat_template("huatuogpt") == model.chat_template(True)
    assert model.chat_template(False) is None
    with pytest.raises(ValueError, match="choose another by --model_args template=chatml"):
        model.chat_template("chatml")
    assert "/" not in model.tokenizer_name


def test_other_templates_have_other_names_in_the_cache_of_requests(folder, on_one_device):
    names = {HuatuoLM(folder, template=one).tokenizer_name for one in ("huatuogpt", "chatml")}
    assert len(names) == 2


class Scripted(LM):
    """Takes the first continuation, answers B, and keeps what each task asked."""

    def __init__(self):
        super().__init__()
        self.asked = collections.defaultdict(list)

    def _keep(self, requests):
        for one in requests:
            self.asked[one.task_name].append(one.args)

    def loglikelihood(self, requests):
        self._keep(requests)
        return [(-float(one.idx), False) for one in requests]

    def loglikelihood_rolling(self, requests):
        raise AssertionError("no task asks for it")

    def generate_until(self, requests):
        self._keep(requests)
        return ["分析：A错误。答案：B" if one.doc["id"] != "2" else "不知道" for one in requests]


def evaluate(lm, tasks, files, **options):
    """A run of the harness with our task files alone."""
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=files)
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)


CMB = [
    {
        "id": str(index),
        "exam_type": "医师考试",
        "exam_class": name,
        "exam_subject": "内科",
        "question": f"问题{index}",
        "question_type": kind,
        "option": {"A": "胃", "B": "心脏", "C": "肝", "D": "", "E": "肾"},
        "answer": answer,
    }
    for index, (name, kind, answer) in enumerate(
        [
            ("执业医师", "单项选择题", "B"),
            ("执业医师", "单项选择题", "A"),
            ("住院医师", "单项选择题", "B"),
            ("住院医师", "多项选择题", "BE"),
            ("住院医师", "单项选择题", "B"),
        ]
    )
]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return os.fspath(path)


def table(path, header, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


def made_up_files(folder):
    """A few questions of every set, in its own layout."""
    letters = ("甲", "乙", "丙", "丁")
    options = dict(zip("ABCD", letters, strict=True))
    medqa = {"question": "问题", "options": options, "answer_idx": "B", "answer": "乙"}
    files = {
        "cmb": write(folder / "cmb.json", json.dumps(CMB)),
        "pubmedqa": write(
            folder / "pubmedqa.json",
            json.dumps(
                {"1": {"QUESTION": "Is it?", "CONTEXTS": ["One.", "Two."], "final_decision": "no"}}
            ),
        ),
        "medmcqa": write(
            folder / "medmcqa.json",
            json.dumps(
                {"id": "1", "question": "Which?", "cop": 4, "subject_name": "Anatomy"}
                | {f"op{letter}": f"{letter} text" for letter in "abcd"}
            ),
        ),
    }
    for region in ("us", "mainland", "taiwan"):
        files[f"medqa_{region}"] = write(folder / f"medqa_{region}.jsonl", json.dumps(medqa))
    header = ("Question", "Options", "Answer", "Explanation", "Medical Discipline")
    lines = "\n".join(f"{letter} {text}" for letter, text in options.items())
    table(folder / "cmexam.csv", header, ("问题", lines, "BD", "", "内科"))
    files["cmexam"] = os.fspath(folder / "cmexam.csv")
    for exam, split, header in (
        ("cmmlu", "test", ("", "Question", *"ABCD", "Answer")),
        ("ceval", "val", ("id", "question", *"ABCD", "answer")),
        ("mmlu", "test", None),
    ):
        subjects = getattr(exam_sets, f"{exam.upper()}_SUBJECTS")
        for subject in subjects:
            ending = "" if exam == "cmmlu" else f"_{split}"
            row = (f"{subject}的问题", *letters, "B")
            row = row if header is None else ("0", *row)
            table(folder / exam / split / f"{subject}{ending}.csv", header, row)
        files[exam] = os.fspath(folder / exam)
    return files


def questions_of(exam, path):
    readers = {
        "cmb": exam_sets.read_cmb,
        "cmexam": exam_sets.read_cmexam,
        "pubmedqa": exam_sets.read_pubmedqa,
        "medmcqa": exam_sets.read_medmcqa,
    }
    if exam.startswith("medqa_"):
        return exam_sets.read_medqa(path, region=exam.removeprefix("medqa_")).questions
    if exam in readers:
        return readers[exam](path).questions
    split = "val" if exam == "ceval" else "test"
    return exam_sets.read_subject_folder(path, exam=exam, split=split).questions


EXAMS = ("cmb", "cmexam", "medqa_us", "medqa_mainland", "medqa_taiwan", "medmcqa", "pubmedqa")
EXAMS += ("cmmlu", "ceval", "mmlu")


def form_of(exam, question):
    name = "medqa" if exam == "medqa_us" else exam
    return exam_prompts.PUBLISHED_FORMS.get(name) or exam_prompts.default_form(question)


def test_every_set_has_its_tasks():
    names = TaskManager(include_path=TASKS, include_defaults=False).all_subtasks
    wanted = [f"huatuo_{exam}" for exam in EXAMS]
    assert sorted(names) == sorted([*wanted, *(f"{name}_generation" for name in wanted)])


def test_tasks_ask_for_the_likelihoods_that_our_own_evaluator_asks_for(tmp_path):
    files, lm = made_up_files(tmp_path), Scripted()
    evaluate(lm, [f"huatuo_{exam}" for exam in EXAMS], files)
    for exam in EXAMS:
        wanted = []
        for question in questions_of(exam, files[exam]):
            prompt = exam_prompts.likelihood_prompt(question, form_of(exam, question))
            wanted += [(prompt.context, each) for each in prompt.continuations]
        assert lm.asked[f"huatuo_{exam}"] == wanted


def test_tasks_ask_for_responses_to_the_prompts_of_our_own_evaluator(tmp_path):
    files, lm = made_up_files(tmp_path), Scripted()
    evaluate(lm, [f"huatuo_{exam}_generation" for exam in EXAMS], files)
    for exam in EXAMS:
        wanted = [
            exam_prompts.chat_messages(one, exam_prompts.default_form(one))[-1]["content"]
            for one in questions_of(exam, files[exam])
        ]
        assert [context for context, _ in lm.asked[f"huatuo_{exam}_generation"]] == wanted


def test_figures_are_those_of_our_own_scores(tmp_path):
    files = made_up_files(tmp_path)
    found = evaluate(Scripted(), ["huatuo_cmb", "huatuo_cmb_generation"], files)["results"]
    questions = questions_of("cmb", files["cmb"])
    b, nothing = frozenset("B"), None
    for task, answers in (
        ("huatuo_cmb", [frozenset("A")] * 5),
        ("huatuo_cmb_generation", [b, b, nothing, b, b]),
    ):
        scores = score_exam(questions, answers)
        assert found[task]["acc,none"] == scores.accuracy.value
        assert found[task]["acc_macro,none"] == pytest.approx(scores.macro.value)
        assert found[task]["unparsed,none"] == scores.unparsed.value
    assert found["huatuo_cmb_generation"]["acc_macro,none"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_a_set_without_files_is_named():
    with pytest.raises(ValueError, match="the files of cmb are not given"):
        evaluate(Scripted(), ["huatuo_cmb"], {})


def test_rows_that_are_no_questions_are_counted(tmp_path, caplog):
    path = write(tmp_path / "cmb.json", json.dumps([*CMB, CMB[0]]))
    evaluate(Scripted(), ["huatuo_cmb"], {"cmb": path})
    assert "cmb: 5 questions of 6 rows; excluded: 1 duplicate id" in caplog.text


@pytest.mark.slow
def test_chats_reach_the_model_with_their_ids(model, tmp_path, monkeypatch):
    """Over likelihoods and responses, and out of the harness's cache."""
    contexts = []
    for name in ("loglikelihood", "generate_until"):
        method = getattr(HuatuoLM, name)

        def keep(self, requests, method=method):
            contexts.extend(one.args[0] for one in requests)
            return method(self, requests)

        monkeypatch.setattr(HuatuoLM, name, keep)
    files = made_up_files(tmp_path)
    tasks = ["huatuo_cmmlu", "huatuo_medqa_us_generation"]
    evaluate(model, tasks, files, apply_chat_template=True, gen_kwargs="max_gen_toks=4")
    assert len(contexts) == 8 * 4 + 1
    assert {type(one) for one in contexts} == {ChatPrompt}


def test_the_harness_keeps_likelihoods_and_finds_them_again(model, tmp_path, monkeypatch):
    cached = CachingLM(model, os.fspath(tmp_path / "cache.db"))
    asked = [request(*pair) for pair in PAIRS]
    first = cached.loglikelihood(asked)
    monkeypatch.setattr(model, "_score", None)
    assert [tuple(one) for one in cached.loglikelihood(asked)] == first


WITHOUT_TORCH = """
import importlib.machinery, json, sys

# As where torch is not installed.
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *further: (
    None if name == "torch" else find(name, *further)
)
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from huatuo_jax.evaluation.harness import TASKS

folder, files = sys.argv[1], json.loads(sys.argv[2])
manager = TaskManager(include_path=TASKS, include_defaults=False, metadata=files)
found = simple_evaluate(
    "huatuo",
    {"pretrained": folder},
    tasks=["huatuo_cmmlu", "huatuo_cmb_generation"],
    task_manager=manager,
    gen_kwargs="max_gen_toks=4",
)
assert "huatuogpt" in found["config"]["model_template"].lower()
print(found["n-samples"]["huatuo_cmmlu"]["effective"], "torch" in sys.modules)
"""


def run(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": os.fspath(ROOT)}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True
    )


@pytest.mark.slow
def test_the_harness_runs_without_torch(folder, tmp_path):
    files = json.dumps(made_up_files(tmp_path))
    done = run("-c", WITHOUT_TORCH, os.fspath(folder), files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["8", "False"]


@pytest.mark.slow
def test_the_command_evaluates_a_model_and_names_a_missing_file(folder, tmp_path):
    command = ["-m", "huatuo_jax.evaluation.harness", "--model", "huatuo"]
    command += ["--model_args", f"pretrained={folder}", "--tasks", "huatuo_cmmlu"]
    files = made_up_files(tmp_path / "files")
    done = run(*command, "--metadata", json.dumps({"cmmlu": files["cmmlu"]}), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "huatuo_cmmlu" in done.stdout and "acc_macro" in done.stdout
    done = run(*command, "--metadata", json.dumps({"cmmlu": "nowhere"}), cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: nowhere: 8 of 8 files")

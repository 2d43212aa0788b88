"""lm-evaluation-harness asks the server, and has the figures of the model in its own process."""

import json

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from huatuo_jax.api.in_use import Settings
from huatuo_jax.evaluation.harness import TASKS, HuatuoLM
from huatuo_jax.serving.models import load
from tests.api import tiny
from tests.serving import live
from tests.tiny import byte_level_tokenizer

pytest.importorskip("tenacity", reason="the harness's clients need lm-eval[api]")

EXAM = [
    {
        "id": str(index),
        "exam_type": "医师考试",
        "exam_class": "执业医师",
        "exam_subject": "内科",
        "question": f"问题{index}：发热{index * 7}天，最可能的是",
        "question_type": "单项选择题",
        "option": {"A": "胃", "B": "心脏", "C": "肝", "D": "肺", "E": "肾"},
        "answer": "ABCDE"[index % 5],
    }
    for index in range(12)
]
PAIRS = [
    ("头痛三天了，", "多喝水"),
    ("发热", "两天"),
    ("发热", "三天，咳嗽"),
    ("The answer is", " B"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, on_one_device):
    """A model whose tokenizer puts nothing before a text, as the harness's client assumes."""
    made = tmp_path_factory.mktemp("made")
    tokenizer = byte_level_tokenizer(
        [one["question"] for one in EXAM],
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.save_pretrained(made / "tokenizer")
    return tiny.save(made / "exam", "lm", tokenizer=made / "tokenizer", max_positions=512)


@pytest.fixture(scope="module")
def server(folder):
    with live.serve(load([str(folder)], [], Settings(), slots=4)) as found:
        yield found


@pytest.fixture(scope="module")
def remote(server):
    return get_model("local-completions")(
        model="exam",
        base_url=f"{server.base_url}/completions",
        tokenizer_backend="remote",
        batch_size=4,
    )


@pytest.fixture(scope="module")
def own(folder):
    return HuatuoLM(str(folder))


def instances(kind, arguments):
    return [
        Instance(kind, doc={}, arguments=one, idx=index, metadata=("task", index, 1))
        for index, one in enumerate(arguments)
    ]


def test_likelihoods_over_http_are_those_of_the_process(remote, own):
    asked = instances("loglikelihood", PAIRS)
    there, here = remote.loglikelihood(asked), own.loglikelihood(asked)
    assert [greedy for _, greedy in there] == [greedy for _, greedy in here]
    assert [value for value, _ in there] == pytest.approx([value for value, _ in here], abs=1e-3)


def test_a_greedy_continuation_is_greedy_over_http_too(remote, own):
    context = "发热两天，"
    (text,) = own.generate_until(instances("generate_until", [(context, {"max_gen_toks": 6})]))
    until = {"until": [], "max_gen_toks": 6}
    (there,) = remote.generate_until(instances("generate_until", [(context, until)]))
    assert there == text
    asked = instances("loglikelihood", [(context, text)])
    if own.loglikelihood(asked)[0][1]:  # The text may have other tokens than were sampled.
        assert remote.loglikelihood(asked)[0][1]


@pytest.mark.slow
def test_an_exam_has_the_same_figures(remote, own, tmp_path):
    exam = tmp_path / "exam.json"
    exam.write_text(json.dumps(EXAM, ensure_ascii=False), encoding="utf-8")
    figures = []
    for model in (remote, own):
        manager = TaskManager(
            include_path=TASKS, include_defaults=False, metadata={"cmb": str(exam)}
        )
        found = simple_evaluate(
            model, tasks=["huatuo_cmb"], task_manager=manager, bootstrap_iters=0
        )
        samples = [
            [answer for answer, _ in one["filtered_resps"]]
            for one in found["samples"]["huatuo_cmb"]
        ]
        figures.append((found["results"]["huatuo_cmb"], samples))
    (there, told), (here, scored) = figures
    assert there == here
    for one, other in zip(told, scored, strict=True):
        assert one == pytest.approx(other, abs=1e-3)

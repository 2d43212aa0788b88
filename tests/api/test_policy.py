"""A policy from Python: it answers as the command does, and says of answers what others say."""

import json
import shutil

import jax
import numpy as np
import pytest
import torch
import transformers

import huatuo_jax as hj
from huatuo_jax.checkpoint.models import find_model, load_params
from huatuo_jax.core.sharding import MeshConfig
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Message
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from tests.api import tiny
from tests.hf import tiny_checkpoints

SYSTEM = "你是一位医生。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("models") / "policy", "lm")


@pytest.fixture(scope="module")
def model(folder):
    """On all eight virtual devices."""
    return hj.load_model(folder)


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    target = tmp_path_factory.mktemp("exported") / "hf"
    model.save(target)
    return target


@pytest.fixture(scope="module")
def theirs(exported):
    return transformers.AutoModelForCausalLM.from_pretrained(exported).eval()


@pytest.fixture()
def compiled():
    """The names of the programs that are compiled in a test, in a list."""
    names = []

    def note(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_responses_are_those_of_the_generate_command(model, folder, tmp_path):
    rows = [
        {"id": "a", "question": tiny.QUESTION, "ward": 3},
        {"id": "b", "messages": tiny.TURNS},
        {"question": "没有编号的问题。"},
    ]
    prompts, output = tmp_path / "python.jsonl", tmp_path / "answers.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    prompts.write_text("".join(lines), encoding="utf-8")
    run_bulk(
        BulkConfig(
            model=str(folder),
            prompts=str(prompts),
            output=str(output),
            num_samples=2,
            seed=4,
            sampling=SamplingConfig(max_new_tokens=12, temperature=0.7, top_k=40),
            chunk_size=2,
        )
    )
    records = [json.loads(line) for line in open(output, encoding="utf-8")]
    found = model.generate(
        rows, num_samples=2, seed=4, max_new_tokens=12, temperature=0.7, top_k=40
    )
    assert [len(group) for group in found] == [2, 2, 2]
    assert found[0][0].token_ids != found[0][1].token_ids
    for record, group in zip(records, found, strict=True):
        for answer, response in zip(record["answers"], group, strict=True):
            assert list(response.prompt_token_ids) == record["prompt_token_ids"]
            assert list(response.token_ids) == answer["token_ids"]
            assert response.text == str(response) == answer["text"]
            assert response.finish_reason == answer["finish_reason"]
            np.testing.assert_allclose(response.log_probs, answer["log_probs"], atol=1e-5)


def test_responses_follow_from_the_seed_and_the_dialogue_alone(model):
    how = {"max_new_tokens": 8, "num_samples": 2}
    alone = model.generate([tiny.QUESTION], seed=1, **how)
    beside = model.generate([tiny.TURNS, tiny.QUESTION], seed=1, **how)[1]
    other = model.generate([tiny.QUESTION], seed=2, **how)[0]
    # The same tokens; their log-probabilities differ in rounding in an engine of another size.
    ids = [[one.token_ids for one in group] for group in (alone[0], beside, other)]
    assert ids[0] == ids[1] != ids[2]
    assert [one.text for one in alone[0]] == [one.text for one in beside]
    assert model.generate([], seed=1) == []


def test_a_chat_without_generation_settings_is_greedy(model):
    ((response,),) = model.generate([tiny.QUESTION], temperature=0.0, max_new_tokens=8)
    assert model.chat(tiny.QUESTION, max_new_tokens=8) == response.text
    assert model.chat([{"role": "user", "content": tiny.QUESTION}], max_new_tokens=8, seed=3) == (
        response.text
    )


def test_a_chat_samples_as_the_folders_generation_config_says(folder, tmp_path):
    told = shutil.copytree(folder, tmp_path / "told")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 6}
    (told / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = hj.load_model(told)
    how = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "max_new_tokens": 6}
    for seed in (1, 2):
        ((response,),) = model.generate([tiny.QUESTION], seed=seed, **how)
        assert model.chat(tiny.QUESTION, seed=seed) == response.text
    ((greedy,),) = model.generate([tiny.QUESTION], temperature=0.0, max_new_tokens=4)
    assert model.chat(tiny.QUESTION, temperature=0.0, top_p=1.0, max_new_tokens=4) == greedy.text


def test_a_conversation_keeps_its_turns(model):
    chat = model.start_chat(system=SYSTEM, max_new_tokens=6)
    first = chat.send("咳嗽一周了。")
    assert first
    second = chat.send("没有。")
    turns = [("system", SYSTEM), ("user", "咳嗽一周了。"), ("assistant", first), ("user", "没有。")]
    messages = [Message(*turn) for turn in turns]
    assert second == model.chat(messages, max_new_tokens=6)
    assert chat.messages == (*messages, Message("assistant", second))
    before = chat.messages
    with pytest.raises(ValueError, match=r"^text: turn 1 \(user\) is empty"):
        chat.send("")
    assert chat.messages == before


def test_a_conversation_goes_on_after_an_empty_answer(model):
    (chat, other) = (model.start_chat(max_new_tokens=4) for _ in range(2))
    chat.send("咳嗽一周了。")
    chat.messages = (*chat.messages[:1], Message("assistant", ""))
    assert isinstance(chat.send("没有。"), str)
    assert len(chat.messages) == 4 and not other.messages
    with pytest.raises(ValueError, match="^system is empty; None takes"):
        model.start_chat(system=" ")


def test_a_second_call_of_other_shapes_compiles_nothing(model, compiled):
    model.generate(["短。", "再长一点的问题。"], max_new_tokens=9)
    model.log_probs("短。", "好。")
    assert compiled
    compiled.clear()
    model.generate(["另一个问题。"], num_samples=2, max_new_tokens=7, temperature=0.4)
    model.chat("再来一个。", max_new_tokens=8)
    model.log_probs("再问一次。", "好的，谢谢。")
    assert not compiled


def test_log_probs_equal_those_of_transformers(model, theirs, exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    template = templates.by_name("huatuogpt")
    responses = ["先多喝水，注意休息。", "去医院。"]
    found = model.log_probs_batch([tiny.QUESTION, tiny.TURNS], responses)
    for dialogue, response, (token_ids, log_probs) in zip(
        ([{"role": "user", "content": tiny.QUESTION}], tiny.TURNS), responses, found, strict=True
    ):
        messages = [Message(**one) for one in dialogue]
        prompt = template.prompt(messages, tokenizer)
        whole = template.render([*messages, Message("assistant", response)], tokenizer).token_ids
        assert list(token_ids) == whole[len(prompt) :]
        with torch.no_grad():
            logits_TV = theirs(torch.tensor([whole])).logits[0].double()
        wanted = torch.log_softmax(logits_TV, -1)[len(prompt) - 1 : -1].numpy()
        wanted = wanted[np.arange(len(token_ids)), list(token_ids)]
        assert log_probs.dtype == np.float32
        np.testing.assert_allclose(log_probs, wanted, atol=2e-5)
    alone = model.log_probs(tiny.QUESTION, responses[0])
    assert alone.token_ids == found[0].token_ids
    np.testing.assert_allclose(alone.log_probs, found[0].log_probs, atol=1e-6)


def test_log_probs_of_a_response_are_those_it_was_sampled_with(model):
    for temperature in (1.0, 0.5):
        ((response,),) = model.generate([tiny.TURNS], max_new_tokens=7, temperature=temperature)
        found = model.log_probs(tiny.TURNS, response, temperature=temperature)
        assert found.token_ids == response.token_ids
        np.testing.assert_allclose(found.log_probs, response.log_probs, atol=2e-5)


def test_a_saved_model_talks_in_transformers(model, theirs, exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    for dialogue in ([{"role": "user", "content": tiny.QUESTION}], tiny.TURNS):
        ids = tokenizer.apply_chat_template(
            dialogue, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        ((response,),) = model.generate([dialogue], temperature=0.0, max_new_tokens=10)
        assert ids[0].tolist() == list(response.prompt_token_ids)
        with torch.no_grad():
            given = theirs.generate(ids, max_new_tokens=10, do_sample=False)
        assert given[0, ids.shape[1] :].tolist() == list(response.token_ids)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_a_saved_model_loads_back_bit_for_bit(model, folder, exported, tmp_path, format):
    again = hj.load_model(exported)  # From either form, to either.
    for one in (model, again):
        target = tmp_path / str(one is model)
        one.save(target, format=format)
        info = find_model(target)
        assert info.form == {"hf": "hugging_face", "orbax": "orbax"}[format]
        same = jax.tree.map(np.array_equal, load_params(info), load_params(find_model(folder)))
        assert all(jax.tree.leaves(same))
        loaded = hj.load_model(target)
        assert repr(loaded.template) == repr(model.template)
    with pytest.raises(FileExistsError, match="not empty"):
        model.save(target, format=format)


def test_a_given_template_is_saved_with_the_model(folder, tmp_path):
    model = hj.load_model(folder, default_system=SYSTEM)
    model.save(tmp_path / "told")
    again = hj.load_model(tmp_path / "told")
    assert again.template == templates.by_name("huatuogpt", default_system=SYSTEM)
    how = {"temperature": 0.0, "max_new_tokens": 4}
    assert again.generate([tiny.QUESTION], **how) == model.generate([tiny.QUESTION], **how)


def test_another_mesh_gives_the_same_answers(folder, model):
    other = hj.load_model(folder, mesh=MeshConfig(data=4, fsdp=1, tensor=2))
    how = {"max_new_tokens": 6, "num_samples": 2}
    found, wanted = (one.generate([tiny.QUESTION, tiny.TURNS], **how) for one in (other, model))
    for ours, others in zip(found, wanted, strict=True):
        assert [one.token_ids for one in ours] == [one.token_ids for one in others]


def test_what_cannot_be_answered_ends_in_one_clear_message(model):
    for call, message in (
        (lambda: model.chat(""), r"^dialogue: turn 1 \(user\) is empty"),
        (lambda: model.chat(tiny.TURNS[:2]), "^dialogue: the prompt ends with a turn of the assis"),
        (lambda: model.generate(["a", ""]), r"^dialogues\[1\]: turn 1 \(user\) is empty"),
        (lambda: model.generate("abc"), "^dialogues is a str; it should be a list"),
        (lambda: model.generate(["疼" * 300]), r"^dialogues\[0\]: \d+ tokens, at most 255 leave"),
        (lambda: model.generate(["a"], num_samples=0), "num_samples=0 must be at least 1"),
        (lambda: model.chat("a", temperature=-1.0), "temperature=-1.0 must be 0"),
        (lambda: model.start_chat(top_p=2.0), "top_p=2.0 must be above 0"),
        (lambda: model.log_probs("a", "疼" * 300), "^response: more than 256 tokens with its dia"),
        (lambda: model.log_probs_batch(["a", "b"], ["c"]), "1 responses for 2 dialogues"),
        (lambda: model.log_probs("a", 3), "^response is int, not text"),
        (lambda: model.log_probs(["a"], "b"), "^dialogue: turn 1 needs role and content"),
        (lambda: model.save("x", format="gguf"), r"format='gguf' must be one of \['hf', 'orbax'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    turns = [*[*tiny.TURNS, {"role": "assistant", "content": "疼" * 240}], tiny.TURNS[0]]
    with pytest.raises(ValueError, match="drop_oldest_turns leaves out its oldest turns"):
        model.chat(turns, max_new_tokens=4)
    ((response,),) = model.generate([turns], max_new_tokens=4, drop_oldest_turns=True)
    assert response.messages_dropped == 4


def test_what_cannot_be_loaded_ends_in_one_clear_message(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    reward = tiny.save(tmp_path / "reward", "score")
    short = tiny.save(tmp_path / "short", "lm", vocab_size=1024)
    for source, options, message in (
        (tmp_path / "empty", {}, "empty is no model: .*config.json: missing"),
        (tmp_path / "none", {}, "none is no model: .*no such folder"),
        (reward, {}, "this model scores; generation needs one with a token head"),
        (folder, {"template": "nope"}, "template: 'nope' is not known"),
        (folder, {"template": "llama3"}, r"tokenizer: has no token '<\|start_header_id\|>'"),
        (folder, {"template": "tokenizer"}, "needs a tokenizer with a chat template"),
        (folder, {"max_length": 257}, "max_length=257 must lie between 2 and the model's 256"),
        (folder, {"slots": 0}, "slots=0 must be at least 1"),
        (folder, {"mesh": MeshConfig(tensor=3)}, "mesh: .* 3 devices"),
        (short, {}, "the tokenizer has 2048 tokens, more than the model's vocab_size=1024"),
    ):
        with pytest.raises(ValueError, match=message):
            hj.load_model(source, **options)


QWEN_LIKE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


@pytest.mark.parametrize(
    ("case", "chat_template", "template"),
    [("llama", QWEN_LIKE, "tokenizer"), ("bloom", None, "huatuogpt")],
)
def test_a_hugging_face_folder_answers_in_its_own_template_as_in_transformers(
    tmp_path, case, chat_template, template
):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.TOKENIZER)
    tokenizer.chat_template = chat_template
    sizes = {"vocab_size": 2052, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    positions = {} if case == "bloom" else {"max_position_embeddings": 256}
    theirs = tiny_checkpoints.transformers_model(case, **sizes, **positions)
    for place in (theirs, tokenizer):
        place.save_pretrained(tmp_path / "source")
    model = hj.load_model(tmp_path / "source")
    assert model.template.name == template
    model.save(tmp_path / "saved")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ends = saved.generation_config.eos_token_id
    assert ends == (2 if case == "bloom" else [4, 2])
    given = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(
        tiny.TURNS, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    ((response,),) = model.generate([tiny.TURNS], temperature=0.0, max_new_tokens=8)
    assert given[0].tolist() == list(response.prompt_token_ids)
    with torch.no_grad():
        found = saved.generate(given, max_new_tokens=8, do_sample=False)[0, given.shape[1] :]
        assert found.tolist() == list(response.token_ids)
        whole = torch.tensor([[*response.prompt_token_ids, *response.token_ids]])
        logits_TV = theirs(whole).logits[0, given.shape[1] - 1 : -1].double()
    wanted = torch.log_softmax(logits_TV, -1).numpy()[np.arange(len(found)), found]
    log_probs = model.log_probs(tiny.TURNS, response)
    assert log_probs.token_ids == response.token_ids
    np.testing.assert_allclose(log_probs.log_probs, wanted, atol=1e-4)

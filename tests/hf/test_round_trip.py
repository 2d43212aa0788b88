"""Hugging Face to ours and back: bit for bit, and loadable by transformers."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from huatuo_jax.backbone.config import ComputeConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.checkpoint.models import find_model, load_params, save_orbax
from huatuo_jax.core import sharding
from huatuo_jax.hf.export import export_model
from tests.hf import baichuan_reference, tiny_checkpoints
from tests.hub_server import rewrite_weights
from tests.tiny import byte_level_tokenizer


def weights(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= safetensors.torch.load_file(path)
    return found


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def add_tokenizer(folder):
    """A tokenizer whose `<pad>` no text encodes to."""
    made = byte_level_tokenizer(
        ["头痛三天，有点发热。"],
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    made.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")


def there_and_back(source, tmp_path, *, head="lm", mesh=None, **options):
    """Through our Orbax directory and out again."""
    model = find_model(source)
    assert model.head == head
    params = load_params(model, mesh=mesh)
    save_orbax(params, model.cfg, tmp_path / "ours", head=head, source_folder=source)
    ours = find_model(tmp_path / "ours")
    assert (ours.cfg, ours.head, ours.form) == (model.cfg, head, "orbax")
    export_model(
        load_params(ours, mesh=mesh),
        ours.cfg,
        tmp_path / "back",
        head=head,
        source_folder=ours.folder,
        **options,
    )
    return tmp_path / "back"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", tiny_checkpoints.TRANSFORMERS_CASES)
def test_weights_and_config_come_back_bit_for_bit(case, dtype, tmp_path):
    reference = tiny_checkpoints.transformers_model(case).to(dtype)
    source = tiny_checkpoints.save(reference, tmp_path / "hf")
    back = there_and_back(source, tmp_path)
    assert_same_bits(weights(source), weights(back))
    name = "generation_config.json"
    assert (back / name).read_bytes() == (source / name).read_bytes()
    if case.startswith("bloom"):
        assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    else:
        assert_same_but_for_old_words(config_of(source), config_of(back))


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def assert_same_but_for_old_words(config, exported):
    """transformers 5 writes `rope_parameters`; transformers 4 reads two other fields."""
    old = dict(config["rope_parameters"])
    words = {"rope_theta": old.pop("rope_theta")}
    words["rope_scaling"] = None if old["rope_type"] == "default" else old
    assert exported == config | words


ROTARY = [case for case in tiny_checkpoints.TRANSFORMERS_CASES if not case.startswith("bloom")]


@pytest.mark.parametrize("case", ROTARY)
def test_both_spellings_of_the_rotary_settings_say_the_same(case, tmp_path):
    reference = tiny_checkpoints.transformers_model(case)
    back = there_and_back(tiny_checkpoints.save(reference, tmp_path / "hf"), tmp_path)
    exported, cfg = config_of(back), find_model(back).cfg
    for spelling, left_out in {
        "both": (),
        "transformers 5": ("rope_theta", "rope_scaling"),
        "transformers 4": ("rope_parameters",),
    }.items():
        folder = tmp_path / spelling
        folder.mkdir()
        kept = {name: value for name, value in exported.items() if name not in left_out}
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        read = transformers.AutoConfig.from_pretrained(folder)
        assert read.rope_parameters == reference.config.rope_parameters
        assert find_model(folder).cfg == cfg


def test_a_config_made_here_has_both_spellings(tmp_path):
    for case in ("llama", "llama_llama3", "qwen3_biased_yarn"):
        source = tiny_checkpoints.save(
            tiny_checkpoints.transformers_model(case), tmp_path / case / "hf"
        )
        model = find_model(source)
        export_model(load_params(model), model.cfg, tmp_path / case / "fresh", head="lm")
        made = config_of(tmp_path / case / "fresh")
        old = made["rope_scaling"] or {"rope_type": "default"}
        assert made["rope_parameters"] == old | {"rope_theta": made["rope_theta"]}
        read = transformers.AutoConfig.from_pretrained(tmp_path / case / "fresh")
        logits = [
            transformers.AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 43)[None])
            for folder in (source, tmp_path / case / "fresh")
        ]
        assert torch.equal(logits[0].logits, logits[1].logits), read.rope_parameters


@pytest.mark.parametrize("case", ["llama", "qwen2", "bloom"])
def test_shards_come_back_as_the_same_shards(case, tmp_path):
    reference = tiny_checkpoints.transformers_model(case)
    source = tiny_checkpoints.save(reference, tmp_path / "hf", max_shard_size="60KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    back = there_and_back(source, tmp_path, max_shard_size="60KB")
    assert_same_bits(weights(source), weights(back))
    assert len(list(back.glob("*.safetensors"))) > 2
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert_same_bits(reference.state_dict(), loaded.state_dict())


def test_a_mesh_changes_no_bit(tmp_path):
    source = tiny_checkpoints.save(tiny_checkpoints.transformers_model("llama"), tmp_path / "hf")
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = load_params(find_model(source), mesh=mesh)
    for leaf, place in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(sharding.parameter_shardings(params, mesh)),
        strict=True,
    ):
        assert leaf.sharding == place
    back = there_and_back(source, tmp_path, mesh=mesh)
    assert_same_bits(weights(source), weights(back))


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3", "bloom"])
def test_transformers_loads_the_export_with_identical_logits(case, tmp_path):
    reference = tiny_checkpoints.transformers_model(case)
    source = tiny_checkpoints.save(reference, tmp_path / "hf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(there_and_back(source, tmp_path))
    tokens_BT = torch.arange(3, 23)[None, :]
    with torch.no_grad():
        assert torch.equal(loaded(tokens_BT).logits, reference(tokens_BT).logits)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3", "bloom"])
def test_transformers_loads_the_reward_model_with_identical_scores(case, tmp_path):
    reference = tiny_checkpoints.transformers_model(case, head="score")
    source = tiny_checkpoints.save(reference, tmp_path / "hf")
    add_tokenizer(source)
    back = there_and_back(source, tmp_path, head="score")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(back)
    assert (loaded.config.num_labels, loaded.config.pad_token_id) == (1, 0)
    assert_same_bits(reference.state_dict(), loaded.state_dict())
    tokens_BT = torch.arange(3, 23).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(tokens_BT).logits, reference(tokens_BT).logits)


def test_a_reward_models_tokenizer_pads_with_an_id_that_no_text_holds(tmp_path):
    """Also where the tokenizer came with pad equal to EOS, as many do."""
    reference = tiny_checkpoints.transformers_model("llama", head="score", vocab_size=301)
    source = tiny_checkpoints.save(reference, tmp_path / "hf")
    add_tokenizer(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(source)
    back = there_and_back(source, tmp_path, head="score")
    exported = transformers.AutoTokenizer.from_pretrained(back)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(back)
    assert exported.pad_token_id == loaded.config.pad_token_id != exported.eos_token_id
    texts = ["头痛</s>", "头痛三天，有点发热。</s>"]
    batch = exported(texts, padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        together = loaded(**batch).logits[:, 0]
        alone = [loaded(**exported(text, return_tensors="pt")).logits[0, 0] for text in texts]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_tokenizer_files_are_carried_over_byte_for_byte(tmp_path):
    source = tiny_checkpoints.save(tiny_checkpoints.transformers_model("llama"), tmp_path / "hf")
    add_tokenizer(source)
    back = there_and_back(source, tmp_path)
    names = {path.name for path in source.iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    for name in names:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("norm_head", [False, True])
def test_alibi_baichuan_goes_back_to_its_own_layout(norm_head, tmp_path):
    reference = baichuan_reference.Baichuan(alibi=True, norm_head=norm_head)
    source = reference.save(tmp_path / "hf")
    (source / "modeling_baichuan.py").write_text("# carried along, never run\n")
    back = there_and_back(source, tmp_path)
    assert_same_bits(weights(source), weights(back))
    for name in ("config.json", "modeling_baichuan.py"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_baichuan2_7b_goes_back_to_its_own_layout(tmp_path):
    source = baichuan_reference.Baichuan(alibi=False, norm_head=True).save(tmp_path / "hf")
    back = weights(there_and_back(source, tmp_path))
    kept = {name: w for name, w in weights(source).items() if "inv_freq" not in name}
    assert_same_bits(kept, back)


def test_baichuan_7b_becomes_a_llama_with_its_fused_weights_split(tmp_path):
    reference = baichuan_reference.Baichuan(alibi=False, norm_head=False)
    back = there_and_back(reference.save(tmp_path / "hf"), tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert type(loaded) is transformers.LlamaForCausalLM
    exported = weights(back)
    for layer in range(reference.layers):
        name = f"model.layers.{layer}.self_attn."
        split = [exported[f"{name}{part}_proj.weight"] for part in "qkv"]
        assert torch.equal(torch.cat(split), reference.weights[name + "W_pack.weight"])
    tokens = list(range(3, 33))
    with torch.no_grad():
        theirs = loaded(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(theirs, reference.logits(tokens), rtol=1e-4, atol=1e-4)
    # And what was split loads again, as the LLaMA it now is.
    again = find_model(back)
    assert again.cfg.family == "llama"
    shutil.copytree(back, tmp_path / "second")
    export_model(load_params(again), again.cfg, tmp_path / "third", head="lm", source_folder=back)
    assert_same_bits(exported, weights(tmp_path / "third"))


def test_a_baichuan_7b_reward_model_becomes_a_llama_classifier(tmp_path):
    source = baichuan_reference.Baichuan(alibi=False, norm_head=False).save(tmp_path / "hf")
    add_tokenizer(source)
    cfg = dataclasses.replace(find_model(source).cfg, vocab_size=301)
    params = init_params(jax.random.key(5), cfg, ComputeConfig(), head="score")
    save_orbax(params, cfg, tmp_path / "ours", head="score", source_folder=source)
    ours = find_model(tmp_path / "ours")
    export_model(
        load_params(ours), ours.cfg, tmp_path / "back", head="score", source_folder=ours.folder
    )
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    assert type(loaded) is transformers.LlamaForSequenceClassification
    tokens_BT = np.arange(3, 23, dtype=np.int32)[None, :]
    model = Transformer(cfg)
    hidden_BTD = model.apply({"params": params}, tokens_BT)
    score = model.apply({"params": params}, hidden_BTD, method="scores")[0, -1]
    with torch.no_grad():
        theirs = loaded(torch.tensor(tokens_BT, dtype=torch.long)).logits[0, 0]
    np.testing.assert_allclose(score, theirs.numpy(), rtol=1e-4, atol=1e-5)


def test_an_alibi_baichuan_reward_model_is_refused_with_the_reason(tmp_path):
    source = baichuan_reference.Baichuan(alibi=True, norm_head=False).save(tmp_path / "hf")
    add_tokenizer(source)
    cfg = dataclasses.replace(find_model(source).cfg, vocab_size=301)
    params = init_params(jax.random.key(5), cfg, ComputeConfig(), head="score")
    with pytest.raises(ValueError, match="no sequence classifier for model_type 'baichuan'"):
        export_model(params, cfg, tmp_path / "back", head="score", source_folder=source)
    assert not (tmp_path / "back").exists()


def test_a_changed_dtype_is_said_in_the_config(tmp_path):
    source = tiny_checkpoints.save(tiny_checkpoints.transformers_model("qwen2"), tmp_path / "hf")
    back = there_and_back(source, tmp_path, dtype="bfloat16")
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in weights(back).values()} == {torch.bfloat16}


def test_a_model_from_scratch_exports_with_a_config_of_its_own(tmp_path):
    for case in ("llama_yarn", "llama_llama3", "mistral", "qwen2_window_tied", "qwen3", "bloom"):
        reference = tiny_checkpoints.transformers_model(case)
        model = find_model(tiny_checkpoints.save(reference, tmp_path / case))
        target = tmp_path / f"{case}_fresh"
        export_model(load_params(model), model.cfg, target, head="lm")
        loaded = transformers.AutoModelForCausalLM.from_pretrained(target)
        tokens_BT = torch.arange(3, 43)[None, :]
        with torch.no_grad():
            assert torch.equal(loaded(tokens_BT).logits, reference(tokens_BT).logits), case


def test_a_checkpoint_of_the_bare_base_model_loads(tmp_path):
    for case in ("bloom", "llama_multi_head_tied"):
        reference = tiny_checkpoints.transformers_model(case)
        whole = tiny_checkpoints.save(reference, tmp_path / f"{case}_whole")
        bare = tiny_checkpoints.save(reference.base_model, tmp_path / f"{case}_bare")
        one, other = load_params(find_model(whole)), load_params(find_model(bare))
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_torch_files_load_like_safetensors(tmp_path):
    reference = tiny_checkpoints.transformers_model("llama").to(torch.bfloat16)
    source = tiny_checkpoints.save(reference, tmp_path / "hf")
    torch_folder = tmp_path / "bin"
    torch_folder.mkdir()
    shutil.copyfile(source / "config.json", torch_folder / "config.json")
    torch.save(reference.state_dict(), torch_folder / "pytorch_model.bin")
    one, other = load_params(find_model(source)), load_params(find_model(torch_folder))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_tied_model_saved_with_its_head_alone_is_read(tmp_path):
    reference = tiny_checkpoints.transformers_model("llama_multi_head_tied")
    source = tiny_checkpoints.save(reference, tmp_path / "hf")

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite_weights(shutil.copytree(source, tmp_path / "head"), rename)
    one, other = load_params(find_model(source)), load_params(find_model(tmp_path / "head"))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))
    back = there_and_back(tmp_path / "head", tmp_path)
    assert_same_bits(weights(back), weights(source))


def test_half_precisions_of_both_kinds_in_one_checkpoint_lose_no_bit(tmp_path):
    """float16 beside bfloat16: within one of our parameters, and over layers."""
    reference = tiny_checkpoints.transformers_model("llama")
    source = tiny_checkpoints.save(reference, tmp_path / "hf")

    def mix(tensors):
        for number, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to((torch.float16, torch.bfloat16)[number % 2])

    rewrite_weights(source, mix)
    mixed = weights(source)
    assert {tensor.dtype for tensor in mixed.values()} == {torch.float16, torch.bfloat16}
    back = there_and_back(source, tmp_path)
    found = weights(back)
    assert found.keys() == mixed.keys()
    for name, tensor in mixed.items():
        assert torch.equal(found[name].float(), tensor.float()), name
    assert config_of(back)["dtype"] == "float32"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert torch.equal(loaded.lm_head.weight.float(), mixed["lm_head.weight"].float())

"""The conversion command, its proof, delta weights, and what it says of bad input."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.checkpoint.models import find_model
from tests.called import call
from tests.hf import baichuan_reference, tiny_checkpoints
from tests.hub_server import rewrite_weights

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    reference = tiny_checkpoints.transformers_model("llama")
    return tiny_checkpoints.save(reference, tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture
def copy(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "copy")


def command(*flags, **options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "convert.py"), *flags],
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.slow
def test_the_command_converts_there_and_back_and_verifies(llama, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    there = command(f"--source={llama}", f"--target={ours}", "--verify")
    assert there.returncode == 0, there.stderr
    assert "verified: " in there.stdout and "KL" in there.stdout
    assert f"written: {ours}" in there.stdout
    assert "reading: 30 of 30 tensors" in there.stderr
    again = command(f"--source={ours}", f"--target={back}", "--verify")
    assert again.returncode == 0, again.stderr
    one, other = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (llama, back)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_ends_in_one_line_and_code_1(copy, tmp_path):
    (copy / "config.json").unlink()
    done = call("convert", f"--source={copy}", f"--target={tmp_path / 'out'}")
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and "config.json" in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_verified_by_its_scores(tmp_path):
    reference = tiny_checkpoints.transformers_model("qwen2", head="score")
    source = tiny_checkpoints.save(reference, tmp_path / "hf")
    agreement = convert(str(source), tmp_path / "ours", verify=True)
    assert agreement.holds and agreement.max_kl is None


def test_verification_notices_weights_that_changed(llama, copy, tmp_path, monkeypatch):
    from huatuo_jax.checkpoint import convert as verify

    convert(str(llama), tmp_path / "ours")
    rewrite_weights(copy, lambda t: t["model.norm.weight"].mul_(1.01))
    agreement = verify.compare_with_transformers(find_model(tmp_path / "ours"), copy)
    assert not agreement.holds


def test_baichuan_is_verified_as_the_llama_it_becomes(tmp_path):
    source = baichuan_reference.Baichuan(alibi=False, norm_head=False).save(tmp_path / "hf")
    with pytest.raises(ValueError, match="no class for model_type 'baichuan'"):
        convert(str(source), tmp_path / "ours", verify=True)
    assert not (tmp_path / "ours").exists()
    convert(str(source), tmp_path / "ours")
    assert convert(str(tmp_path / "ours"), tmp_path / "llama", verify=True).holds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_delta_gives_the_model_it_was_made_from(dtype, tmp_path):
    whole = tiny_checkpoints.transformers_model("llama").to(dtype)
    base = tiny_checkpoints.transformers_model("llama_linear").to(dtype)
    expected, difference = {}, {}
    base_weights = base.state_dict()
    for name, weight in whole.state_dict().items():
        kept = "embed_tokens" in name or "lm_head" in name
        difference[name] = weight if kept else weight - base_weights[name]
        expected[name] = weight if kept else difference[name] + base_weights[name]
    delta = tiny_checkpoints.save(whole, tmp_path / "delta")
    rewrite_weights(delta, lambda tensors: tensors.update(difference))
    # A base of another vocabulary: its embedding and head are not read.
    base_folder = tiny_checkpoints.save(base, tmp_path / "base")

    def shrink(tensors):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:100].clone()

    rewrite_weights(base_folder, shrink)
    convert(str(delta), tmp_path / "ours", delta_base=str(base_folder))
    convert(str(tmp_path / "ours"), tmp_path / "back")
    summed = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(summed[name], weight), name


def test_a_base_that_is_not_the_deltas_is_refused(llama, tmp_path):
    other = tiny_checkpoints.transformers_model("llama_one_kv_head_biased")
    base = tiny_checkpoints.save(other, tmp_path / "base")
    with pytest.raises(ValueError, match="not the base of this delta"):
        convert(str(llama), tmp_path / "ours", delta_base=str(base))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox' is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2, "foo": 1}}, "foo"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        ({"hidden_size": "many"}, "wrong type"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs"),
    ],
)
def test_a_config_we_cannot_do_is_named(changes, message, copy, tmp_path):
    tiny_checkpoints.edit_config(copy, **changes)
    with pytest.raises(ValueError, match=message):
        convert(str(copy), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lacks tensors model.norm.weight"),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected tensors extra"),
        (lambda t: t.update({"lm_head.weight": torch.ones(7, 48)}), r"lm_head.weight \(7, 48\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, copy, tmp_path):
    rewrite_weights(copy, change)
    with pytest.raises(ValueError, match=message):
        convert(str(copy), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_folder_that_is_no_model_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="config.json"):
        convert(str(tmp_path / "empty"), tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert(str(tmp_path / "absent"), tmp_path / "ours")


def test_a_truncated_file_is_an_error(copy, tmp_path):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors.*cut short"):
        convert(str(copy), tmp_path / "ours")


def test_a_config_that_is_not_json_is_an_error(copy, tmp_path):
    (copy / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        convert(str(copy), tmp_path / "ours")


def test_a_target_that_holds_something_is_left_alone(llama, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "thesis.tex").write_text("do not lose")
    with pytest.raises(FileExistsError, match="not empty"):
        convert(str(llama), tmp_path / "ours")
    assert (tmp_path / "ours" / "thesis.tex").read_text() == "do not lose"


def test_a_bad_shard_size_is_an_error(llama, tmp_path):
    convert(str(llama), tmp_path / "ours")
    with pytest.raises(ValueError, match="'5 stones' is not a size"):
        convert(str(tmp_path / "ours"), tmp_path / "back", max_shard_size="5 stones")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("form", ["hugging_face", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_no_target_and_says_so(llama, tmp_path, form):
    """A file size limit stands in for the disk: writing fails in the same call."""
    limited = "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)); sys.argv = sys.argv[1:];"
    limited += "runpy.run_path(sys.argv[0], run_name='__main__')"
    source = llama
    if form == "hugging_face":
        source = tmp_path / "ours"
        convert(str(llama), source)
    done = subprocess.run(
        [
            *(sys.executable, "-c", limited, str(ROOT / "launch" / "convert.py")),
            *(f"--source={source}", f"--target={tmp_path / form}"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": ""},
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr
    assert not (tmp_path / form).exists()
    assert not list(tmp_path.glob(f"{form}.tmp*"))


@pytest.mark.slow
def test_a_killed_conversion_never_leaves_a_folder_that_loads(tmp_path):
    """SIGKILL at moments spread over the whole run, in both directions."""
    config = tiny_checkpoints.config_of("llama")
    config.update({"hidden_size": 768, "intermediate_size": 3072, "head_dim": 128})
    import transformers

    source = tmp_path / "hf"
    transformers.LlamaForCausalLM(config).save_pretrained(source, max_shard_size="20MB")
    convert(str(source), tmp_path / "whole")
    for start, target in ((source, tmp_path / "ours"), (tmp_path / "whole", tmp_path / "back")):
        flags = [f"--source={start}", f"--target={target}"]
        begun = time.monotonic()
        assert command(*flags).returncode == 0
        duration_s = time.monotonic() - begun
        shutil.rmtree(target)
        for moment in range(12):
            process = subprocess.Popen(
                [sys.executable, str(ROOT / "launch" / "convert.py"), *flags],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            time.sleep(duration_s * (0.45 + 0.05 * moment))
            process.send_signal(signal.SIGKILL)
            process.wait()
            for folder in tmp_path.glob(f"{target.name}*"):
                if folder == target:  # Whole, or it would not bear this name.
                    convert(str(folder), tmp_path / "proof")
                    shutil.rmtree(tmp_path / "proof")
                    shutil.rmtree(folder)
                else:
                    with pytest.raises((OSError, ValueError)):
                        find_model(folder)
        assert command(*flags).returncode == 0
        assert not list(tmp_path.glob(f"{target.name}.tmp*"))


def test_the_backbone_config_is_stored_with_the_weights(llama, tmp_path):
    convert(str(llama), tmp_path / "ours")
    stored = json.loads((tmp_path / "ours" / "backbone.json").read_text(encoding="utf-8"))
    assert stored["head"] == "lm"
    assert stored["backbone"]["num_layers"] == 3


def test_the_command_ignores_fields_that_the_user_names(copy, tmp_path):
    tiny_checkpoints.edit_config(copy, hospital="third")
    refused = call("convert", f"--source={copy}", f"--target={tmp_path / 'out'}")
    assert refused.returncode == 1 and "ignore_config_fields" in refused.stderr
    done = call(
        "convert",
        f"--source={copy}",
        f"--target={tmp_path / 'out'}",
        "--ignore_config_fields=hospital",
    )
    assert done.returncode == 0, done.stderr
    convert(str(tmp_path / "out"), tmp_path / "back")
    assert "hospital" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_a_delta_without_a_tokenizer_takes_its_bases(llama, copy, tmp_path):
    from tests.hub_server import save_chatml_tokenizer

    base = shutil.copytree(llama, tmp_path / "base")
    save_chatml_tokenizer(base, template=None)
    tiny_checkpoints.edit_config(base, eos_token_id=77)
    convert(str(copy), tmp_path / "ours", delta_base=str(base))
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["eos_token_id"] == 2

"""What ends an answer is the same wherever a model answers: template, tokenizer and its folder."""

import dataclasses
import json
import shutil

import pytest

from huatuo_jax.checkpoint.convert import convert
from huatuo_jax.generation.bulk import BulkConfig, run_bulk
from huatuo_jax.generation.requests import SamplingConfig
from huatuo_jax.hf.generation_config import stop_token_ids


def write(folder, name, **fields):
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")


def ids(folder, tokenizer, **changes):
    given = {"of_template": (7,), "vocab_size": 320} | changes
    return stop_token_ids(folder, tokenizer, **given)


def test_they_are_the_templates_the_tokenizers_and_the_folders(tokenizer, tmp_path):
    eos = tokenizer.eos_token_id
    assert ids(None, tokenizer) == ids(tmp_path, tokenizer) == (7, eos)
    write(tmp_path, "config.json", eos_token_id=11)
    assert ids(tmp_path, tokenizer) == (7, eos, 11)
    # As in transformers, which looks into config.json only where this file is absent.
    write(tmp_path, "generation_config.json", eos_token_id=[eos, 12, 13])
    assert ids(tmp_path, tokenizer) == (7, eos, 12, 13)
    write(tmp_path, "generation_config.json", eos_token_id=None)
    assert ids(tmp_path, tokenizer) == (7, eos)


def test_an_id_that_the_model_does_not_have_is_refused_by_its_place(tokenizer, tmp_path):
    write(tmp_path, "generation_config.json", eos_token_id=[2, 320])
    with pytest.raises(ValueError, match="config.json: eos_token_id is 320, .* 0 to 319"):
        ids(tmp_path, tokenizer)
    write(tmp_path, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(ValueError, match="eos_token_id='</s>' must be an id or a list of ids"):
        ids(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="the chat template's end of turn is 321"):
        ids(None, tokenizer, of_template=(321,))


def answers(model, prompts_file, output):
    run_bulk(
        BulkConfig(
            model=str(model),
            prompts=str(prompts_file),
            output=str(output),
            sampling=SamplingConfig(max_new_tokens=8, temperature=0.0),
        )
    )
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").split("\n") if line]
    return [row["answers"][0] for row in rows]


def test_generation_stops_at_the_ids_of_generation_config_in_either_form(
    model_folder, prompts_file, tokenizer, tmp_path
):
    free = answers(model_folder, prompts_file, tmp_path / "free.jsonl")
    third = next(
        one["token_ids"][2] for one in free if one["token_ids"][2] not in one["token_ids"][:2]
    )
    convert(str(model_folder), tmp_path / "hf")
    for form in ("hf", "ours"):
        folder = tmp_path / form
        if form == "ours":
            shutil.copytree(model_folder, folder)
        write(folder, "generation_config.json", eos_token_id=[tokenizer.eos_token_id, third])
        cut = answers(folder, prompts_file, tmp_path / f"{form}.jsonl")
        for one, whole in zip(cut, free, strict=True):
            if third not in whole["token_ids"]:
                assert one == whole
                continue
            kept = whole["token_ids"][: whole["token_ids"].index(third) + 1]
            assert (one["token_ids"], one["finish_reason"]) == (kept, "stop")
            assert one["text"] == tokenizer.decode(kept[:-1])
        assert any(one["finish_reason"] == "stop" for one in cut)


def test_ids_of_the_request_are_added_to_the_models(model_folder, prompts_file, tmp_path):
    cfg = BulkConfig(
        model=str(model_folder), prompts=str(prompts_file), output=str(tmp_path / "a.jsonl")
    )
    sampling = SamplingConfig(max_new_tokens=2, stop_token_ids=(9,))
    run_bulk(dataclasses.replace(cfg, sampling=sampling))
    settings = json.loads((tmp_path / "a.jsonl.settings.json").read_text(encoding="utf-8"))
    assert 9 in settings["sampling"]["stop_token_ids"]
    assert len(settings["sampling"]["stop_token_ids"]) == 2

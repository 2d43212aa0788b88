"""The clinic's tokenizer is that of its grammar, and says its dialogues in few tokens."""

import os
import pathlib
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

import huatuo_jax
from huatuo_jax.clinic import build_tokenizer
from huatuo_jax.clinic.dialogues import dialogues
from huatuo_jax.clinic.files import TOKENIZER
from huatuo_jax.data.build_tokenizer import VOCAB_SIZE, main
from huatuo_jax.data.chat.templates import HuatuoGPTTemplate
from huatuo_jax.data.records import KINDS

ROOT = pathlib.Path(huatuo_jax.__file__).resolve().parents[1]


def assert_as_shipped(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (TOKENIZER / name).read_bytes()


def test_building_the_tokenizer_again_gives_the_same_files(tmp_path):
    build_tokenizer.build(tmp_path)
    assert_as_shipped(tmp_path)


@pytest.mark.slow
def test_building_the_tokenizer_in_another_process_gives_the_same_files(tmp_path):
    """With one thread: no dependence on hash seeds or the number of cores."""
    command = [sys.executable, "-m", "huatuo_jax.clinic.build_tokenizer", tmp_path]
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    assert_as_shipped(tmp_path)


def test_every_dialogue_of_another_clinic_fits_in_512_tokens_and_comes_back():
    tokenizer, template = AutoTokenizer.from_pretrained(TOKENIZER), HuatuoGPTTemplate()
    assert len(tokenizer) == VOCAB_SIZE
    characters = tokens = 0
    for kind in KINDS:
        for dialogue in dialogues(kind, 40, seed=5, held_out=True):
            texts = [message.content for message in dialogue.messages]
            encoded = tokenizer(texts, add_special_tokens=False).input_ids
            assert tokenizer.batch_decode(encoded) == texts
            characters, tokens = characters + sum(map(len, texts)), tokens + sum(map(len, encoded))
            assert len(template.render(dialogue.messages, tokenizer).token_ids) <= 512
    assert characters / tokens > 1.7


def test_a_folder_without_dialogues_is_refused_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^error: .*no file .*_instruction.jsonl"):
        main([str(tmp_path), str(tmp_path / "there")])
    assert not (tmp_path / "there").exists()

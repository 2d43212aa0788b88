"""Tokens as texts and bytes, for byte-level vocabularies and SentencePiece's."""

import pytest

from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.hf.tokenizer import load_tokenizer
from huatuo_jax.serving.tokens import Tokens, finite
from tests.tiny import byte_level_tokenizer

TEXT = "头痛 three days，🤒 龘"


def sentencepiece():
    return load_tokenizer(SAMPLE_FOLDER / "tokenizer")


def byte_level():
    return byte_level_tokenizer(
        ["头痛三天"], vocab_size=300, special_tokens=["</s>"], eos_token="</s>"
    )


@pytest.mark.parametrize("make", [sentencepiece, byte_level])
def test_the_bytes_of_tokens_are_those_of_the_text(make):
    tokenizer = make()
    tokens = Tokens(tokenizer)
    token_ids = tokenizer.encode(TEXT, add_special_tokens=False)
    found = b"".join(tokens.of(one).bytes for one in token_ids)
    assert found.decode().strip() == TEXT
    partial = [tokens.of(one) for one in token_ids if tokens.of(one).text.startswith("bytes:")]
    assert partial
    for one in partial:
        assert one.text == "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)
    end = tokens.of(tokenizer.eos_token_id)
    assert end.text == "</s>" and end.bytes == b"</s>"


def test_names_of_different_tokens_differ():
    tokenizer = sentencepiece()
    tokens = Tokens(tokenizer)
    byte = tokenizer.convert_tokens_to_ids("<0x41>")
    letter = next(one for one in range(2048) if tokens.of(one).text == "A" and one != byte)
    assert tokens.of(byte) == tokens.of(letter)
    assert tokens.named([letter, byte]) == {letter: "A", byte: f"token_id:{byte}"}


def test_an_id_behind_the_last_token_has_no_text():
    tokens = Tokens(sentencepiece())
    assert tokens.of(10**6).text == ""


def test_an_impossible_token_has_a_number():
    assert finite(float("-inf")) == -9999.0 and finite(-1.5) == -1.5

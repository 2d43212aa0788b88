"""The shipped tokenizers hold whole characters, and spell everything else in bytes."""

import random

import pytest
from transformers import AutoTokenizer

from huatuo_jax.clinic import files as clinic_files
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.build_tokenizer import BYTES, SPECIAL_TOKENS, VOCAB_SIZE

FOLDERS = {"sample": SAMPLE_FOLDER / "tokenizer", "clinic": clinic_files.TOKENIZER}
SURROGATES = range(0xD800, 0xE000)
# Written where decoding finds a byte that belongs to no character.
REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def tokenizer(request):
    return AutoTokenizer.from_pretrained(FOLDERS[request.param])


def test_each_token_is_whole_characters_or_one_of_the_256_bytes(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert len(tokens) == VOCAB_SIZE
    assert tuple(tokens[: len(SPECIAL_TOKENS) + 256]) == (*SPECIAL_TOKENS, *BYTES)
    texts = [one for one in tokens if one not in BYTES]
    assert not any(REPLACEMENT in one for one in texts)
    for text in texts:
        assert tokenizer.decode([tokenizer.convert_tokens_to_ids(text)]) == text


def test_tokens_of_whole_characters_never_run_into_each_other(tokenizer):
    """Whatever a model samples in between, a token adds its own characters to the text."""
    draw = random.Random(0)
    first = len(SPECIAL_TOKENS) + len(BYTES)
    ids = [draw.randrange(first, len(tokenizer)) for _ in range(2_000)]
    assert tokenizer.decode(ids) == "".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    "text",
    [
        "<病人>：",
        "<HuatuoGPT>：您好。 ",
        " 两个  空格\n\t换行\r\n",
        "\t\n\n\t\u3000\u2028\x00\x7f",
        "繁體與日本語かな",
        "龘靐齉𠮷𰻝",
        "😷👩‍⚕️🫀 naïve é e\u0301",
        f"血压120/80mmHg，体温38.5℃；{REPLACEMENT}",
        "<0x41><0xE4>",
    ],
)
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(len(SPECIAL_TOKENS)))


def test_texts_of_any_characters_come_back_from_their_tokens(tokenizer):
    draw = random.Random(0)
    points = [one for one in range(0x110000) if one not in SURROGATES]
    texts = ["".join(map(chr, draw.choices(points, k=40))) for _ in range(200)]
    encoded = tokenizer(texts, add_special_tokens=False).input_ids
    assert tokenizer.batch_decode(encoded) == texts

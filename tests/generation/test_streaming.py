"""The text of a growing answer: in pieces that together are the whole, none taken back."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from huatuo_jax.data.answers import text_of
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Message
from huatuo_jax.generation.streaming import GrowingAnswer
from huatuo_jax.hf.tokenizer import load_tokenizer
from tests.tiny import TOKENIZER, byte_level_tokenizer

THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{{ m['content'] }} ~end~{{ eos_token }}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEXTS = [
    "多喝水，注意休息。",
    "🙂👩‍⚕️ ß 𠮷𠮷 ok",
    "a literal \ufffd\ufffd\ufffd\ufffd passes",
    "ends with \ufffd",
    "  two  spaces \n\n and lines\n",
    "~en ~end~ ~",
    "",
]


def byte_fallback_tokenizer():
    """Few characters of its own, all others by their bytes, decoded as SentencePiece does."""
    names = ["<s>", "</s>", "[", "]", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*"▁abcdefghijklmnopqrstuvwxyz多喝水好病，。"]
    made = Tokenizer(
        models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True)
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "sample": lambda: load_tokenizer(TOKENIZER),
    "byte level": lambda: byte_level_tokenizer(["多喝水"], vocab_size=300, eos_token="</s>"),
    "byte fallback": byte_fallback_tokenizer,
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    made = TOKENIZERS[request.param]()
    made.chat_template = THINKING
    return made


def pieces(growing, ids, *, at_once, final):
    found = [growing.grow(ids[:end]) for end in range(at_once, len(ids), at_once)]
    return [*found, growing.finish(final)]


@pytest.mark.parametrize("name", ["huatuogpt", "tokenizer"])
@pytest.mark.parametrize("content", TEXTS)
def test_the_pieces_together_are_the_answer(tokenizer, name, content):
    template = templates.by_name(name)
    written = f"<think>\n\n</think>\n\n{content} ~end~" if name == "tokenizer" else content + " "
    ids = tokenizer.encode(written, add_special_tokens=False)
    whole = text_of(tokenizer, ids)
    final = template.content_of(whole, tokenizer, ended=True)
    for at_once in (1, 3):
        found = pieces(GrowingAnswer(template, tokenizer), ids, at_once=at_once, final=final)
        assert "".join(found) == final
    if len(content) > 8 and at_once == 3:
        assert len([one for one in found if one]) > 1


def test_random_bytes_never_double_or_lose_a_character(tokenizer):
    template, draw = templates.by_name("huatuogpt"), random.Random(0)
    for _ in range(60):
        ids = [draw.randrange(4, len(tokenizer)) for _ in range(draw.randrange(1, 30))]
        final = template.content_of(text_of(tokenizer, ids), tokenizer, ended=True)
        found = pieces(GrowingAnswer(template, tokenizer), ids, at_once=1, final=final)
        assert "".join(found) == final


def test_what_may_start_a_stop_string_waits(tokenizer):
    growing = GrowingAnswer(templates.by_name("huatuogpt"), tokenizer, ("多喝水好", "喝病"))
    given = ""
    for text, shown in (
        ("。", "。"),
        ("。多", "。"),
        ("。多喝水", "。"),
        ("。多喝水多", "。多喝水"),
        ("。多喝水多喝", "。多喝水"),
        ("。多喝水多喝。", "。多喝水多喝。"),
    ):
        given += growing.grow(tokenizer.encode(text, add_special_tokens=False))
        assert given == shown
    assert given + growing.finish("。多喝水多喝。") == "。多喝水多喝。"


def test_without_a_template_the_text_is_given_as_it_is(tokenizer):
    growing = GrowingAnswer(None, tokenizer, ("水水",))
    ids = tokenizer.encode("发烧  水", add_special_tokens=False)
    cut = next(n for n in range(len(ids)) if text_of(tokenizer, ids[:n]) == "发烧  ")
    assert growing.grow(ids[:cut]) == "发烧  " and growing.grow(ids) == ""
    assert growing.finish("发烧  水 ") == "水 "
    draw = random.Random(1)
    for _ in range(60):
        ids = [draw.randrange(4, len(tokenizer)) for _ in range(draw.randrange(1, 30))]
        final = text_of(tokenizer, ids)
        found = pieces(GrowingAnswer(None, tokenizer), ids, at_once=1, final=final)
        assert "".join(found) == final


def test_a_character_waits_for_its_bytes(tokenizer):
    growing = GrowingAnswer(templates.by_name("huatuogpt"), tokenizer)
    start, ids = (tokenizer.encode(one, add_special_tokens=False) for one in ("水", "水𠮷水"))
    assert growing.grow(ids[: len(start)]) == "水"
    assert [growing.grow(ids[: len(start) + more]) for more in (1, 2, 3)] == ["", "", ""]
    assert growing.grow(ids) == "𠮷水"


def test_a_conversation_of_the_template_is_what_the_test_says():
    tokenizer = byte_fallback_tokenizer()
    tokenizer.chat_template = THINKING
    turns = (Message("user", "a"), Message("assistant", "b"))
    assert templates.by_name("tokenizer").text(turns, tokenizer) == (
        "[user]a[assistant]<think>\n\n</think>\n\nb ~end~</s>"
    )

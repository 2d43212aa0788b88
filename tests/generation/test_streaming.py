"""The text of a growing answer: in pieces that together are the whole, none taken back."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from huatuo_jax.data.answers import text_of
from huatuo_jax.data.chat import templates
from huatuo_jax.data.records import Message
from huatuo_jax.generation.requests import Request, Running, SamplingConfig, finished
from huatuo_jax.generation.streaming import GrowingAnswer, GrowingText, TextChangedError
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


def byte_fallback_tokenizer(*, leading_space=False):
    """Few characters of its own, all others by their bytes, decoded as SentencePiece does.

    With a leading space it is written before each text, and left out of the first token's.
    """
    names = ["<s>", "</s>", "[", "]", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [*"▁abcdefghijklmnopqrstuvwxyz多喝水好病，。"]
    made = Tokenizer(
        models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True)
    )
    scheme = "first" if leading_space else "never"
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if leading_space else []
    made.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "sample": lambda: load_tokenizer(TOKENIZER),
    "byte level": lambda: byte_level_tokenizer(["多喝水"], vocab_size=300, eos_token="</s>"),
    "byte fallback": byte_fallback_tokenizer,
    "leading space": lambda: byte_fallback_tokenizer(leading_space=True),
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


def drawn_ids(tokenizer, texts, *, seed):
    """Ids of texts, then random ones, runs of special tokens and of white space among them."""
    draw = random.Random(seed)
    ids = [one for text in texts for one in tokenizer.encode(text, add_special_tokens=False)]
    special = tokenizer.all_special_ids or [0]
    space = tokenizer.encode(" ", add_special_tokens=False)
    for _ in range(40):
        kind = draw.randrange(4)
        if kind == 0:
            ids += [draw.choice(special)] * draw.randrange(12)
        elif kind == 1:
            ids += space * draw.randrange(12)
        else:
            ids += [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(12))]
    return ids


def assert_grows_as_the_whole(tokenizer, ids):
    growing, settled = GrowingText(tokenizer), ""
    for end in range(len(ids) + 1):
        whole = text_of(tokenizer, ids[:end])
        assert growing.of(ids[:end]) == whole
        now = growing.settled(ids[:end])
        assert now.startswith(settled) and whole.startswith(now)
        settled = now
    at_once = GrowingText(tokenizer)
    for end in range(0, len(ids), 7):
        at_once.settled(ids[:end])
    assert at_once.of(ids) == text_of(tokenizer, ids)


def test_a_growing_text_is_that_of_all_tokens_at_every_length(tokenizer):
    for seed in range(4):
        assert_grows_as_the_whole(tokenizer, drawn_ids(tokenizer, TEXTS, seed=seed))
        assert_grows_as_the_whole(tokenizer, drawn_ids(tokenizer, [], seed=seed))


@pytest.mark.parametrize("name", ["qwen2.5", "minimind_6400", "baichuan_rebuilt"])
def test_a_growing_text_of_a_real_tokenizer_is_that_of_all_tokens(shared_data, name):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    texts = [*TEXTS, "ཀཁག ሀለሐ 𓀀𓀁 👨‍👩‍👧‍👦 naïve  café\r\n\t头痛发热怎么办？"]
    for seed in range(2):
        assert_grows_as_the_whole(tokenizer, drawn_ids(tokenizer, texts, seed=seed))


def decoded_in(tokenizer, monkeypatch, work):
    """The number of ids that are decoded meanwhile."""
    count, decode = 0, tokenizer.decode

    def counting(ids, **options):
        nonlocal count
        count += len(ids)
        return decode(ids, **options)

    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "decode", counting)
        work()
    return count


def test_each_token_is_decoded_a_few_times_however_long_the_answer_is(tokenizer, monkeypatch):
    ids = tokenizer.encode("多喝水，好。" * 200, add_special_tokens=False)
    growing = GrowingAnswer(templates.by_name("huatuogpt"), tokenizer)

    def stream():
        for end in range(1, len(ids) + 1):
            growing.grow(ids[:end])

    running = Running(0, Request(prompt_token_ids=[1], sampling=STOPPING), 0)

    def search():
        for one in ids:
            running.token_ids.append(one)
            assert finished(running, active=True, tokenizer=tokenizer) is None

    assert decoded_in(tokenizer, monkeypatch, stream) < 30 * len(ids)
    assert decoded_in(tokenizer, monkeypatch, search) < 100 * len(ids)


STOPPING = SamplingConfig(max_new_tokens=10_000, stop_strings=("~end~", "水 水"))


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_stop_string_is_found_where_the_whole_text_first_has_it(tokenizer, at_once):
    ids = tokenizer.encode("a多喝水，好。" * 20 + " 水 水 ~end~ a", add_special_tokens=False)
    first = next(
        end
        for end in range(len(ids))
        if any(stop in text_of(tokenizer, ids[:end]) for stop in STOPPING.stop_strings)
    )
    running = Running(0, Request(prompt_token_ids=[1], sampling=STOPPING), 0)
    for end in range(at_once, len(ids) + at_once, at_once):
        running.token_ids = ids[:end]
        running.log_probs = running.sampling_log_probs = [0.0] * end
        answer = finished(running, active=True, tokenizer=tokenizer)
        if answer is not None:
            break
    assert answer.token_ids == ids[:first]
    assert answer.text == text_of(tokenizer, ids).partition("水 水")[0]


def test_a_text_that_does_not_continue_what_was_given_is_an_error(tokenizer):
    growing = GrowingAnswer(None, tokenizer)
    assert growing.grow(tokenizer.encode("多喝", add_special_tokens=False))
    with pytest.raises(TextChangedError, match="cannot be streamed; ask for them without stream"):
        growing.finish("好")
    with pytest.raises(TextChangedError):
        growing.grow(tokenizer.encode("好喝", add_special_tokens=False))

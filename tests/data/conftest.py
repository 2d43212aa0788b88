"""Small tokenizers of each family, trained on invented text, for the tests of templates."""

import io
import json
import pathlib
import random

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHAT_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
# The split of Llama-3 and Qwen2: line breaks gather with the blanks before them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def invented_corpus(num_lines: int = 1500) -> list[str]:
    """Lines of invented questions and answers, with runs of blanks, breaks and quotes."""
    draw = random.Random(7)
    subjects = ["头痛", "咳嗽", "胃胀", "失眠", "a sore throat", "back pain", "皮疹", "发热"]
    spans = ["三天", "两周", "半年", "since Monday", "10 days", "一直"]
    advice = ["多喝水", "注意休息", "去医院检查", "see a doctor", "清淡饮食", "measure it twice"]
    starts = ["医生您好，", "请问", "“您好”：", "Hello, ", "\n\n", " ", "  ", "\n \n", "：“"]
    lines = []
    for _ in range(num_lines):
        question = f"{draw.choice(starts)}{draw.choice(subjects)}{draw.choice(spans)}了怎么办？"
        answer = f"建议{draw.choice(advice)}，{draw.choice(advice)}。\n\n1. {draw.choice(advice)}\n"
        lines.append(f"user\n{question}\n \nassistant\n\n{answer} [INST] <病人>：“{question}” ")
    return lines


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the control tokens of ChatML and Llama-3; padding is EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=CHAT_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(invented_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A SentencePiece BPE with byte fallback, as Llama-2's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(invented_corpus()),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.999,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def load_llama(folder: pathlib.Path, model: bytes, **settings: object) -> PreTrainedTokenizerFast:
    (folder / "tokenizer.model").write_bytes(model)
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session", params=["first", "always", "normalizer"])
def llama_tokenizer(request, sentencepiece_model, tmp_path_factory) -> PreTrainedTokenizerFast:
    """Llama-2's family: the blank before a text only at its start, or after each special token.

    The third has it from its normaliser, as the published `tokenizer.json` of Llama-2.
    """
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = load_llama(folder, sentencepiece_model, legacy=request.param != "first")
    if request.param == "normalizer":
        blank = normalizers.Replace(" ", "▁")
        tokenizer._tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank])
        tokenizer._tokenizer.pre_tokenizer = None
    return tokenizer

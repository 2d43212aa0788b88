"""Trains a tokenizer on a folder of data: BPE of 2,048 tokens over characters, bytes for others.

Run as `python -m huatuo_jax.data.build_tokenizer FOLDER_OF_DATA TARGET`. The same data give the
same files, byte for byte. The tokenizers of the sample and of the clinic were made by it.

A token holds whole characters, so a model that samples tokens never joins the bytes of two
characters wrongly. Rare characters are spelt in bytes, as in LLaMA's tokenizer.
"""

import collections
import json
import os
import sys
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from huatuo_jax.core.files import as_path, make_folder, read_rows, write_file
from huatuo_jax.data.chat.templates import HUATUOGPT_SYSTEM

VOCAB_SIZE = 2048
# There is no `<unk>`: characters without a token are spelt in bytes.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
# The most frequent characters; others are spelt in bytes, which leaves room for words.
MAX_CHARACTERS = 1024
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Tokens do not cross the borders of: a role prefix, one digit, a run of letters or of Chinese
# characters. So a sentence of the system text, which is in every row, becomes one token.
_PIECES = r"<病人>：|<HuatuoGPT>：|\d|[A-Za-z]+|[\u4e00-\u9fff]+|[^A-Za-z\d\u4e00-\u9fff]"

_HELD_OUT = "held_out_"
_ROLE_PREFIXES = {"user": "<病人>：", "assistant": "<HuatuoGPT>："}
_CONFIG = {
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def corpus(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Yields the texts to learn from, in the order of the files, without held-out files.

    Dialogues are rendered as by HuatuoGPT's template, with system text and role prefixes: these are
    in every row, and a tokenizer that never saw them spends a hundred tokens on each.

    Args:
        folder: with `*_instruction.jsonl` and `*_conversation.jsonl` in this project's format, and
            optionally `cases.jsonl` and `exams.jsonl`.

    Raises:
        ValueError: there are no dialogues.
    """
    place = as_path(folder)
    paths = [
        path
        for family in ("instruction", "conversation")
        for path in sorted(place.glob(f"*_{family}.jsonl"))
        if not path.name.startswith(_HELD_OUT)
    ]
    if not paths:
        raise ValueError(
            f"{place}: no file *_instruction.jsonl or *_conversation.jsonl to train on"
        )
    for path in paths:
        for row in read_rows(path, unfinished="read"):
            yield HUATUOGPT_SYSTEM
            for message in row["messages"]:
                yield f"{_ROLE_PREFIXES[message['role']]}{message['content']} "
    if (place / "cases.jsonl").exists():
        for row in read_rows(place / "cases.jsonl", unfinished="read"):
            yield f"{row['medical_case']}\n{row['doctor_diagnosis']}"
    if (place / "exams.jsonl").exists():
        for row in read_rows(place / "exams.jsonl", unfinished="read"):
            options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
            yield f"{row['question']}\n{options}\n{row['explanation']}"


def train(folder: str | os.PathLike[str]) -> Tokenizer:
    """Trains the tokenizer of a folder's data: any text round-trips, texts start with `<s>`."""
    texts = list(corpus(folder))
    counts = collections.Counter("".join(texts))
    alphabet = sorted(counts, key=lambda one: (-counts[one], one))[:MAX_CHARACTERS]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[*SPECIAL_TOKENS, *BYTES],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer can reserve ids for special tokens only; the bytes are ordinary tokens.
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = [one for one in made["added_tokens"] if one["content"] not in BYTES]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[start]
    )
    return tokenizer


def build(folder: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer` reads them.

    Args:
        folder: of the data.
        target: folder of the tokenizer; made if it does not exist.

    Raises:
        ValueError: there are no dialogues to train on.
    """
    tokenizer, place = train(folder), as_path(target)
    make_folder(place)
    write_file(place / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = json.dumps(_CONFIG, ensure_ascii=False, indent=2)
    write_file(place / "tokenizer_config.json", f"{config}\n")


def main(arguments: list[str]) -> None:
    """Builds the tokenizer of a folder of data into the target."""
    if len(arguments) != 2:
        raise SystemExit("error: give a folder of data and a target, and nothing else")
    try:
        build(*arguments)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1:])

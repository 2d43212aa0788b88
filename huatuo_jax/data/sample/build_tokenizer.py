"""Trains the tokenizer that ships with the sample data: byte-level BPE of 2,048 tokens.

Run as `python -m huatuo_jax.data.sample.build_tokenizer [FOLDER]`; without a folder it writes over
the shipped one. The same data give the same files, byte for byte.
"""

import json
import pathlib
import sys
from collections.abc import Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from huatuo_jax.data.sample import FOLDER
from huatuo_jax.data.templates import HUATUOGPT_SYSTEM
from huatuo_jax.json_lines import read_rows

VOCAB_SIZE = 2048
# There is no `<unk>`: whatever has no token of its own is spelt in bytes.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
# Eight Chinese characters: the system text, the same in every dialogue, stays a phrase of tokens
# and does not grow into a few tokens that nothing else uses.
MAX_TOKEN_BYTES = 24

_ROLE_PREFIXES = {"user": "<病人>：", "assistant": "<HuatuoGPT>："}
_CONFIG = {
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def corpus() -> Iterator[str]:
    """The texts to learn from, in the order of the files.

    Dialogues come as HuatuoGPT's template renders them, system text and role prefixes included:
    they stand in every row, and a tokenizer that never saw them spends a hundred tokens on each.
    """
    for path in sorted(FOLDER.glob("*_instruction.jsonl")) + sorted(
        FOLDER.glob("*_conversation.jsonl")
    ):
        for row in read_rows(path, unfinished="read"):
            yield HUATUOGPT_SYSTEM
            for message in row["messages"]:
                yield f"{_ROLE_PREFIXES[message['role']]}{message['content']} "
    for row in read_rows(FOLDER / "cases.jsonl", unfinished="read"):
        yield f"{row['medical_case']}\n{row['doctor_diagnosis']}"
    for row in read_rows(FOLDER / "exams.jsonl", unfinished="read"):
        options = "\n".join(f"{letter}. {text}" for letter, text in row["options"].items())
        yield f"{row['question']}\n{options}\n{row['explanation']}"


def train() -> Tokenizer:
    """The tokenizer of the sample data: any text round-trips, `<s>` is put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    start = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[start]
    )
    return tokenizer


def build(folder: pathlib.Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, as `AutoTokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    train().save(str(folder / "tokenizer.json"))
    config = json.dumps(_CONFIG, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(f"{config}\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Builds into the folder named, or over the shipped one."""
    build(pathlib.Path(arguments[0]) if arguments else FOLDER / "tokenizer")


if __name__ == "__main__":
    main(sys.argv[1:])

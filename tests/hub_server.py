"""A made-up Hub cache: tiny random models under the names that the cards ask for."""

import io
import json
import pathlib
import shutil

import huggingface_hub
import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, trainers

from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.records import KINDS
from huatuo_jax.hf.tokenizer import save_loaded
from tests.hf import tiny_checkpoints
from tests.hf.baichuan_reference import Baichuan
from tests.tiny import byte_level_tokenizer

BAICHUAN = "baichuan-inc/Baichuan-7B"
ZIYA = "IDEA-CCNL/Ziya-LLaMA-13B-Pretrain-v1"
QWEN = "Qwen/Qwen2.5-7B"
VOCAB = 2048
POSITIONS = 512
SPEAKERS = ("病人", "HuatuoGPT")
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' +"
    " message['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def sample_texts() -> list[str]:
    """The contents of the package's sample dialogues."""
    texts = []
    for kind in KINDS:
        for line in (SAMPLE_FOLDER / f"{kind}.jsonl").read_text(encoding="utf-8").split("\n"):
            if line:
                texts += [one["content"] for one in json.loads(line)["messages"]]
    return texts


def sentencepiece_model(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sample_texts()[:300]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


def save_chatml_tokenizer(folder: pathlib.Path, *, template: str | None) -> None:
    """A byte-level tokenizer as Qwen's base models have it: EOS is `<|endoftext|>`."""
    fast = byte_level_tokenizer(
        sample_texts()[:300],
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def save_straddling_tokenizer(
    folder: pathlib.Path, *, template: str | None, alphabet: str = ""
) -> None:
    """One whose tokens reach over the border of HuatuoGPT's turns, as Baichuan's do."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Replace("▁", " ")
    ends = [f"{text[-1]} <{name}>：{text[0]}" for text in sample_texts() for name in SPEAKERS]
    trainer = trainers.BpeTrainer(
        vocab_size=1900,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=list(alphabet),
        show_progress=False,
        max_token_length=4,
    )
    made.train_from_iterator([*sample_texts()[:200], *ends], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    save_loaded(fast, folder)


def save_baichuan(folder: pathlib.Path) -> None:
    """As Baichuan-7B's page has it: remote code for model and tokenizer, old buffers."""
    model = Baichuan(alibi=False, norm_head=False, num_heads=8, hidden=64, vocab=VOCAB)
    model.save(folder)
    tiny_checkpoints.edit_config(folder, max_position_embeddings=POSITIONS)
    settings = {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "split_digits": True}
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(**settings))
    token = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": True}
    config = {
        "tokenizer_class": "BaiChuanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaiChuanTokenizer", None]},
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": token | {"content": "<s>"},
        "eos_token": token | {"content": "</s>"},
        "unk_token": token | {"content": "<unk>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    for name in ("modeling_baichuan.py", "tokenization_baichuan.py"):
        (folder / name).write_text("# carried along, never run\n", encoding="utf-8")


def save_llama(folder: pathlib.Path) -> None:
    """As LLaMA's pages have it: `tokenizer.model` and a class of transformers."""
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=8)
    tiny_checkpoints.scatter(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(remove_extra_whitespaces=False))
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")


def save_qwen(folder: pathlib.Path, *, template: str | None = QWEN_TEMPLATE) -> None:
    """As Qwen2.5's base models: EOS is `<|endoftext|>`, whatever the chat template ends with."""
    sizes = SIZES | {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.Qwen2Config(**sizes, num_key_value_heads=4)
    tiny_checkpoints.scatter(transformers.Qwen2ForCausalLM(config)).save_pretrained(folder)
    save_chatml_tokenizer(folder, template=template)


class Hub:
    """A cache folder of the Hub, which is not reached."""

    def __init__(self, cache: pathlib.Path) -> None:
        self.cache = cache

    def add(self, hub_id: str, folder: pathlib.Path) -> pathlib.Path:
        """The folder's files as a repository's snapshot; returns where they lie."""
        repository = self.cache / f"models--{hub_id.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit, encoding="utf-8")
        return pathlib.Path(shutil.copytree(folder, repository / "snapshots" / commit))

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """This process takes the folder for its cache, and the environment of others too."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(self.cache))
        monkeypatch.setenv("HF_HUB_CACHE", str(self.cache))
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def rewrite_weights(folder: pathlib.Path, change) -> None:
    """Applies a function to the dict of a folder's tensors, in place."""
    path = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})

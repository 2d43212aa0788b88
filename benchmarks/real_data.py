"""The real data and the model of 8 million parameters that benchmarks train on it."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.core.files import write_rows
from huatuo_jax.data.formats.disc import read_disc_comparisons
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.records import Comparison
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig

BESIDE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
SHARED_DATA = pathlib.Path(os.environ.get("HUATUO_SHARED_DATA", BESIDE))
TEMPLATE = "chatml"
BACKBONE = BackboneConfig(
    family="llama",
    vocab_size=6400,
    hidden_size=256,
    intermediate_size=704,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_positions=1024,
    tie_embeddings=True,
)
# Kind -> (name, files, adapter) of its sources.
SOURCES = {
    "real_instruction": (
        ("toyhom", ("1_sft_single_real/toyhom_internal_medicine.csv",), "toyhom"),
        ("medicalgpt", ("1_sft_single_real/medicalgpt_medical_sft.jsonl",), None),
    ),
    "real_conversation": (
        ("cmtmedqa", ("2_sft_multi_real/CMtMedQA_test.json",), None),
        ("remedi", ("2_sft_multi_real/remedi_dev_human_annotation.txt",), "remedi"),
        ("disc_examples", ("2_sft_multi_real/disc_test_examples.jsonl",), None),
    ),
    "distilled_instruction": (
        ("bentsao", ("3_distilled/bentsao_llama_data.json",), None),
        (
            "apollo",
            (
                "3_distilled/apollo_Medical_Patient_zh_sampled.json",
                "3_distilled/apollo_Medical_Web_zh_sampled.json",
            ),
            "apollo",
        ),
    ),
    "distilled_conversation": (
        ("bentsao_liver", ("3_distilled/bentsao_liver_cancer.json",), "bentsao"),
        ("disc_dialogues", ("3_distilled/disc_dialogues/*.json",), None),
    ),
}


def folder() -> pathlib.Path:
    """Where the real data are.

    Raises:
        ValueError: nowhere.
    """
    if not SHARED_DATA.is_dir():
        raise ValueError(
            f"{SHARED_DATA}: absent; set HUATUO_SHARED_DATA to the folder of real data"
        )
    return SHARED_DATA


def sft_settings(*, steps: int, batch_size: int) -> SftConfig:
    """Fine-tuning from scratch on all four kinds, on rows of 1,024 tokens."""
    data = folder()
    sources = tuple(
        SourceConfig(
            name=name,
            paths=tuple(str(path) for pattern in files for path in sorted(data.glob(pattern))),
            kind=kind,
            adapter=adapter,
        )
        for kind, group in SOURCES.items()
        for name, files, adapter in group
    )
    return SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer=str(data / "tokenizers" / "minimind_6400")),
        data=DataConfig(
            sources=sources,
            template=TEMPLATE,
            row_length=1024,
            held_out=HeldOutConfig(share=0.03),
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100, beta2=0.99),
        num_steps=steps,
        batch_size=batch_size,
        compute=ComputeSection(loss_chunk=256),
        loop=LoopConfig(evaluate_every=300, checkpoint_every=50, log_every=10),
    )


def ppo_optimizer(learning_rate: float) -> OptimizerConfig:
    """Of policy and critic, at a rate that is reached after four updates and stays."""
    return OptimizerConfig(
        learning_rate=learning_rate, decay="constant", warmup_steps=4, weight_decay=0.0
    )


def disc_pairs() -> dict[str, list[Comparison]]:
    """The pairs of each case of DISC-MedLLM's evaluation, which they name in a field."""
    data = folder()
    dialogues = sorted((data / "3_distilled" / "disc_dialogues").glob("*.json"))
    scores = sorted((data / "4_preference" / "disc_gpt4_scores").glob("*/*.jsonl"))
    by_case: dict[str, list[Comparison]] = {}
    for pair in read_disc_comparisons(dialogues, scores):
        case = pair.id.partition(":")[0]
        extra = {**pair.extra, "case": case}
        by_case.setdefault(case, []).append(dataclasses.replace(pair, extra=extra))
    return {case: by_case[case] for case in sorted(by_case)}


def write_pairs(path: pathlib.Path, pairs: Sequence[Comparison]) -> str:
    """Writes comparisons, one a line."""
    write_rows(path, (pair.to_json() for pair in pairs))
    return str(path)

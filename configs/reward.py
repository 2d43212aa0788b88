"""A reward model on the sample data: minutes on two cores, no download, no judge.

    python launch/train.py --config=configs/reward.py --workdir=runs/reward
    python launch/train.py --config=configs/reward.py:MODEL_DIR --workdir=runs/reward
    python launch/train.py --config=configs/reward.py:MODEL_DIR,mine.jsonl --workdir=runs/mine

Hardware: any CPU. Without a model's directory a short SFT stage makes the backbone first.

Data: comparison files of your own, named after the model's directory; or, without any, comparisons
made of the package's sample dialogues. There the longest answer of each dialogue is taken to be
better than four spoiled forms of it, which no judge has seen: its first half (`cut_short`), its
first quarter over and over (`repeated`), its characters in disorder (`shuffled`) and the answer of
another dialogue (`mismatched_reference`). The first three can be told by their form; the last needs
some understanding, which few dialogues do not teach a model of this size. So this shows that the
stage works, and nothing about medicine. A fifth of the dialogues is held out of both stages. Length
alone tells `cut_short` apart, and the report has it beside the model.

The report is `reward/reward_report.json`, its `accuracy_by_source` names the four forms; the model
is `reward/model`, ready for `launch/score.py`.
"""

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.readers import source_names
from huatuo_jax.data.records import KINDS
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.preferences.synthetic import WHOLE_DIALOGUE
from huatuo_jax.recipe.config import StagesConfig
from huatuo_jax.reward.config import RewardConfig
from huatuo_jax.sft import SftConfig
from huatuo_jax.training.dialogue_data import DataConfig, SourceConfig
from huatuo_jax.training.initial_model import ModelConfig
from huatuo_jax.training.loop import LoopConfig
from huatuo_jax.training.optimizer import OptimizerConfig

BACKBONE = BackboneConfig(
    family="llama",
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=352,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_positions=512,
    tie_embeddings=True,
)
# The same for both stages: the backbone has not read what the reward model is tested on.
HELD_OUT = HeldOutConfig(share=0.2)


def get_config(model_and_files: str = "") -> StagesConfig:
    """Returns the stages and their settings; the module describes the argument."""
    model, *files = model_and_files.split(",")
    if files:
        sources = tuple(
            ComparisonSource(name=name, paths=(one,))
            for name, one in zip(source_names(files), files, strict=True)
        )
    else:
        sources = tuple(
            ComparisonSource(
                paths=(str(SAMPLE_FOLDER / f"{kind}.jsonl"),), reads="dialogues_to_spoil"
            )
            for kind in KINDS
        )
    reward = RewardConfig(
        model=ModelConfig(directory=model or "{workdir}/sft/model"),
        data=ComparisonsConfig(
            sources=sources,
            max_length=512,
            row_length=2048,
            held_out=HELD_OUT,
            group_field=None if files else WHOLE_DIALOGUE,
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_share=0.1),
        num_epochs=2,
        batch_size=2,
        loop=LoopConfig(evaluate_every=40, checkpoint_every=40, log_every=5),
    )
    if model:
        return StagesConfig(reward=reward)
    return StagesConfig(sft=short_sft(), reward=reward)


def short_sft() -> SftConfig:
    """Returns a short SFT stage on the same sample dialogues, for the backbone under the head."""
    sources = tuple(
        SourceConfig(name=kind, paths=(str(SAMPLE_FOLDER / f"{kind}.jsonl"),), kind=kind)
        for kind in KINDS
    )
    return SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer=str(SAMPLE_FOLDER / "tokenizer")),
        data=DataConfig(sources=sources, row_length=512, held_out=HELD_OUT),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_share=0.05),
        num_epochs=2,
        batch_size=4,
        loop=LoopConfig(evaluate_every=20, checkpoint_every=20, log_every=5),
    )

"""Direct preference optimisation on the sample data: minutes on two cores, no download, no judge.

    python launch/train.py --config=configs/dpo.py --workdir=runs/dpo
    python launch/train.py --config=configs/dpo.py:MODEL_DIR --workdir=runs/dpo
    python launch/train.py --config=configs/dpo.py:MODEL_DIR,mine.jsonl --workdir=runs/mine

Hardware: any CPU. Without a model's directory a short SFT stage makes the policy first.

Data: comparison files of your own, named after the model's directory, the same that
`configs/reward.py` takes; or, without any, the comparisons made of the package's sample dialogues
that are described there. They teach the policy to say less of what was spoiled by hand, which shows
that the stage works and nothing about medicine.

Expected: `dpo/margin` is 0 and `train/loss` log 2 at the first step; on held-out comparisons the
accuracy rises far above one half. A `LoraConfig` in `model` trains adapters instead of the weights.

Curves are in `dpo/metrics.jsonl` (and TensorBoard), the policy in `dpo/model`.
"""

from huatuo_jax.backbone.config import BackboneConfig
from huatuo_jax.data import SAMPLE_FOLDER
from huatuo_jax.data.mixture import HeldOutConfig
from huatuo_jax.data.readers import source_names
from huatuo_jax.data.records import KINDS
from huatuo_jax.dpo import DpoConfig
from huatuo_jax.preferences.data import ComparisonsConfig, ComparisonSource
from huatuo_jax.preferences.synthetic import WHOLE_DIALOGUE
from huatuo_jax.recipe.config import StagesConfig
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
# The same for both stages: the policy has not read what it is tested on.
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
    dpo = DpoConfig(
        model=ModelConfig(directory=model or "{workdir}/sft/model"),
        data=ComparisonsConfig(
            sources=sources,
            max_length=512,
            row_length=2048,
            held_out=HELD_OUT,
            group_field=None if files else WHOLE_DIALOGUE,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_share=0.1, weight_decay=0.0),
        num_epochs=1,
        batch_size=2,
        loop=LoopConfig(evaluate_every=40, checkpoint_every=40, log_every=5),
    )
    if model:
        return StagesConfig(dpo=dpo)
    return StagesConfig(sft=_short_sft(), dpo=dpo)


def _short_sft() -> SftConfig:
    sources = tuple(
        SourceConfig(name=kind, paths=(str(SAMPLE_FOLDER / f"{kind}.jsonl"),), kind=kind)
        for kind in KINDS
    )
    return SftConfig(
        model=ModelConfig(backbone=BACKBONE, tokenizer=str(SAMPLE_FOLDER / "tokenizer")),
        data=DataConfig(sources=sources, row_length=512, held_out=HELD_OUT),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_share=0.05),
        num_epochs=1,
        batch_size=4,
        loop=LoopConfig(evaluate_every=40, checkpoint_every=40, log_every=10),
    )

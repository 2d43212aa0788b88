"""Tiny DPO runs on groups of token ids: what the tests of DPO share."""

from huatuo_jax.data.accounting import Account
from huatuo_jax.dpo import DpoConfig, DpoStage
from huatuo_jax.preferences.data import Comparisons, ComparisonsConfig, ComparisonSource
from huatuo_jax.training.initial_model import ComputeSection, ModelConfig, open_model
from huatuo_jax.training.loop import LoopConfig, train
from huatuo_jax.training.optimizer import OptimizerConfig
from huatuo_jax.training.run_directory import begin_stage
from tests.preferences.tiny import SMALL
from tests.tiny import one_device


def config(**changed):
    lora = changed.pop("lora", None)
    dtype = changed.pop("compute_dtype", "float32")
    row_length = changed.pop("row_length", 100)
    settings = {
        "model": ModelConfig(backbone=changed.pop("backbone", SMALL), tokenizer="none", lora=lora),
        "data": ComparisonsConfig(
            sources=(ComparisonSource(paths=("none",)),), max_length=20, row_length=row_length
        ),
        "optimizer": OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
        "beta": 0.3,
        "num_steps": 6,
        "batch_size": 2,
        "compute": ComputeSection(compute_dtype=dtype, loss_chunk=16),
        "loop": LoopConfig(evaluate_every=4, checkpoint_every=2, tensorboard=False),
    }
    return DpoConfig(**(settings | changed))


def tiny_model(cfg):
    return open_model(cfg.model, cfg.compute.compute_config())


def tiny_job(cfg, workdir, groups, held_out=(), *, mesh=None):
    decisive = {"num_steps": cfg.num_steps}
    stage = DpoStage(cfg, mesh=mesh or one_device(), workdir=workdir, model=tiny_model(cfg))
    stage.use(Comparisons(tuple(groups), tuple(held_out), Account("comparisons")))
    directory = begin_stage(workdir, "dpo", settings=decisive, decisive=decisive)
    return stage.make_job(directory, decisive)


def run_tiny(cfg, workdir, groups, held_out=(), **options):
    return train(tiny_job(cfg, workdir, groups, held_out, **options), cfg.loop)

"""A reference that follows the policy, by copies or by a moving mean, and runs that resume."""

import shutil

import jax
import numpy as np
import pytest

from huatuo_jax.backbone.lora import LoraConfig
from huatuo_jax.ppo.config import ReferenceSyncConfig
from huatuo_jax.ppo.judging import JudgingConfig
from huatuo_jax.training.loop import train
from huatuo_jax.training.metrics import read_rows
from tests.killing import Stage, assert_identical
from tests.ppo.tiny import config, tiny_job

LORA = LoraConfig(rank=2, alpha=4.0)
RLOO = {"estimator": "rloo", "rollout": {"answers_per_prompt": 2}}


def synced(**fields):
    """A run of four iterations whose reference moves."""
    changed = RLOO | {"num_iterations": 4, "num_epochs": 1} | fields.pop("changed", {})
    return config(reference_sync=ReferenceSyncConfig(**fields), **changed)


def leaves(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [{"compute": {"compute_dtype": "bfloat16"}}, {"lora": LORA}],
    ids=["weights", "adapters"],
)
def test_after_each_copy_the_kl_is_0_to_the_bit_and_the_next_iteration_it_is_not(tmp_path, changed):
    cfg = synced(every=2, mixup_alpha=1.0, changed=changed)
    train(tiny_job(cfg, tmp_path), cfg.loop)
    kl = [row["ppo/kl_per_sequence"] for row in read_rows(tmp_path / "ppo" / "metrics.jsonl")]
    assert kl[0] == kl[2] == 0
    assert kl[1] != 0 and kl[3] != 0


def test_a_moving_reference_is_the_mean_of_a_plain_loop_over_the_policies(tmp_path):
    every, mixup_alpha = 2, 0.3
    cfg = synced(every=every, mixup_alpha=mixup_alpha)
    job = tiny_job(cfg, tmp_path)
    state, trainer = job.make_state(), job.make_trainer()
    expected = [leaf.astype(np.float64) for leaf in leaves(state.policy.trained)]
    for left, right in zip(expected, leaves(state.reference), strict=True):
        assert np.array_equal(left, right)
    for iteration in range(1, 5):
        state, _ = trainer.iterate(state)
        policy = leaves(state.policy.trained)
        if iteration % every == 0:
            expected = [
                mixup_alpha * new + (1 - mixup_alpha) * old
                for new, old in zip(policy, expected, strict=True)
            ]
        found = leaves(state.reference)
        for left, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
        assert any(not np.array_equal(*pair) for pair in zip(found, policy, strict=True))


def test_a_run_resumes_with_the_reference_that_it_had_bit_for_bit(tmp_path):
    stage = Stage(module="none", name="ppo", num_steps=4, texts=("samples.jsonl",))
    cfg = synced(every=1, mixup_alpha=0.3, changed={"loop": {"checkpoint_every": 3}})
    job = tiny_job(cfg, tmp_path)
    train(job, cfg.loop)
    unbroken = stage.result(tmp_path)
    assert any(path.startswith("['reference']") for path in unbroken[0])
    shutil.rmtree(stage.checkpoints(tmp_path) / "4")  # As a kill right before it leaves things.
    train(tiny_job(cfg, tmp_path), cfg.loop)
    assert_identical(stage.result(tmp_path), unbroken)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mixup_alpha": 0.0}, "mixup_alpha=0.0 must be above 0 and at most 1"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"changed": {"kl_coef": 0.0}}, "kl_coef=0.0 has no use for reference_sync"),
        ({"changed": {"stop_at_total_kl": 3.0}}, "stop_at_total_kl must be None"),
        ({"changed": {"judging": JudgingConfig()}}, "judging must be None with reference_sync"),
        ({"changed": {"lora": LORA}}, "mixup_alpha=0.6 must be 1 with model.lora"),
    ],
)
def test_a_reference_that_cannot_move_so_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        synced(**({"every": 1} | changed))

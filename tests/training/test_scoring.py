"""Scores and log-probabilities of given answers: however they are batched, they are the same."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig, RopeConfig
from huatuo_jax.backbone.transformer import Transformer, init_params
from huatuo_jax.core import sharding
from huatuo_jax.hf.export import export_model
from huatuo_jax.training.scoring import (
    GivenAnswer,
    Normalization,
    Scorer,
    answer_log_probs,
    head_scores,
    load_normalization,
    padded_batch,
    save_normalization,
)
from tests.tiny import backbone

EOS = 2
CFG = backbone(vocab_size=50, hidden_size=16, intermediate_size=32, head_dim=8, max_positions=64)
MODEL = Transformer(CFG, ComputeConfig())


def _params(head, *, scale=8.0):
    """Fresh weights, blown up so that scores and log-probabilities differ between answers."""
    params = init_params(jax.random.key(3), CFG, ComputeConfig(), head=head)
    return jax.tree.map(lambda leaf: leaf * scale if leaf.ndim > 1 else leaf, params)


@pytest.fixture(scope="module")
def reward():
    return {"params": _params("score")}


@pytest.fixture(scope="module")
def policy():
    # At 8, attention is so near to a tie that float32 alone is 3e-5 from float64 on some CPUs.
    return {"params": _params("lm", scale=6.0)}


@pytest.fixture(scope="module")
def answers():
    """Prompts and answers of many lengths, with EOS inside of some prompts and at most ends."""
    draw = np.random.default_rng(0)
    made = []
    for index in range(13):
        length = (2, 11, 17, 29)[index % 4]
        ids = draw.integers(3, CFG.vocab_size, length).astype(np.int32)
        ids[length // 3] = EOS
        if index % 3:
            ids[-1] = EOS
        made.append(GivenAnswer(ids, int(draw.integers(1, length))))
    return made


@pytest.fixture(scope="module")
def alone(reward, answers):
    """Each answer's score with nothing beside it."""

    @jax.jit
    def score(ids_1T):
        return MODEL.apply(reward, MODEL.apply(reward, ids_1T), method="scores")[0, -1]

    return np.array([score(jnp.asarray(one.token_ids[None])) for one in answers])


def _one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("surplus", "padding"), [(0, EOS), (1, EOS), (17, EOS), (5, 41)])
def test_scores_do_not_depend_on_side_amount_or_id_of_padding(
    reward, answers, alone, side, surplus, padding
):
    lengths = np.array([len(one.token_ids) for one in answers])
    width = lengths.max() + surplus
    ids = np.full((len(answers), width), padding, np.int32)
    for row, one in enumerate(answers):
        place = slice(width - len(one.token_ids), width) if side == "left" else slice(lengths[row])
        ids[row, place] = one.token_ids
    batch = padded_batch(
        jnp.asarray(ids),
        prompt_lengths_B=jnp.array([one.prompt_length for one in answers]),
        lengths_B=jnp.asarray(lengths),
        side=side,
    )
    scores_BT = jax.jit(head_scores, static_argnums=0)(MODEL, reward, batch)
    found = scores_BT[jnp.arange(len(answers)), batch["last_B"]]
    assert np.std(alone) > 0.1
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh_sizes", "packed", "row_length", "rows"),
    [
        (None, True, None, 3),
        (None, False, 40, 16),
        ({"data": 2, "fsdp": 2, "tensor": 2}, True, None, 4),
        ({"data": 1, "fsdp": 8, "tensor": 1}, False, 32, 8),
    ],
)
def test_scores_do_not_depend_on_packing_batch_or_mesh(
    reward, answers, alone, mesh_sizes, packed, row_length, rows
):
    mesh = _one_device() if mesh_sizes is None else sharding.make_mesh(**mesh_sizes)
    placed = jax.device_put(reward, sharding.parameter_shardings(reward, mesh))
    scorer = Scorer(
        MODEL,
        placed,
        mesh=mesh,
        rows_at_once=rows,
        row_length=row_length,
        packed=packed,
        pad_token_id=EOS,
    )
    np.testing.assert_allclose(scorer.scores(answers), alone, rtol=0, atol=1e-5)


def test_scores_are_those_of_the_same_answers_in_another_order(reward, answers, alone):
    order = np.random.default_rng(1).permutation(len(answers))
    scorer = Scorer(MODEL, reward, mesh=_one_device(), rows_at_once=3)
    found = scorer.scores([answers[index] for index in order])
    np.testing.assert_allclose(found, alone[order], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def exact_tables(policy, answers, tmp_path_factory):
    """Log-probabilities of all tokens at each of an answer's own, by transformers in float64."""
    folder = tmp_path_factory.mktemp("policy") / "model"
    export_model(policy["params"], CFG, folder, head="lm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    def tables(temperature):
        made = []
        for one in answers:
            with torch.no_grad():
                logits_TV = theirs(torch.from_numpy(one.token_ids).long()[None]).logits[0]
            every_TV = torch.log_softmax(logits_TV / temperature, dim=-1).numpy()
            made.append(every_TV[one.prompt_length - 1 : -1])
        return made

    return tables


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_those_of_transformers(policy, answers, exact_tables, temperature):
    scorer = Scorer(MODEL, policy, mesh=_one_device(), rows_at_once=4, pad_token_id=EOS)
    found = scorer.log_probs(answers, temperature=temperature, chunk=7)
    for one, every_TV, log_probs_T in zip(answers, exact_tables(temperature), found, strict=True):
        chosen_T = np.take_along_axis(every_TV, one.token_ids[one.prompt_length :, None], axis=-1)
        np.testing.assert_allclose(log_probs_T, chosen_T[:, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("mesh", ["one device", "eight devices"])
def test_top_log_probs_are_the_best_of_transformers(policy, answers, exact_tables, mesh):
    mesh = _one_device() if mesh == "one device" else sharding.make_mesh(data=4, tensor=2)
    scorer = Scorer(MODEL, policy, mesh=mesh, rows_at_once=4, pad_token_id=EOS)
    found = scorer.top_log_probs(answers, count=3, temperature=0.7, chunk=7)
    own = scorer.log_probs(answers, temperature=0.7, chunk=7)
    for one, every_TV, top, log_probs_T in zip(answers, exact_tables(0.7), found, own, strict=True):
        answer_T = one.token_ids[one.prompt_length :]
        best_TK = np.argsort(-every_TV, axis=-1)[:, :3]
        np.testing.assert_array_equal(top.token_ids, best_TK)
        expected_TK = np.take_along_axis(every_TV, best_TK, axis=-1)
        np.testing.assert_allclose(top.top_log_probs, expected_TK, rtol=0, atol=2e-5)
        chosen_T = every_TV[np.arange(len(answer_T)), answer_T]
        np.testing.assert_allclose(top.log_probs, chosen_T, rtol=0, atol=2e-5)
        np.testing.assert_allclose(top.log_probs, log_probs_T, rtol=0, atol=1e-6)
        is_best_T = top.token_ids[:, 0] == answer_T
        np.testing.assert_array_equal(top.log_probs[is_best_T], top.top_log_probs[is_best_T, 0])
    assert scorer.top_log_probs([], count=1) == []
    for count in (0, CFG.vocab_size + 1):
        with pytest.raises(ValueError, match=f"count={count} must lie between 1 and .* 50 tokens"):
            scorer.top_log_probs(answers, count=count)


def test_log_probs_stand_at_their_tokens_and_are_zero_elsewhere(policy):
    ids = jnp.array([[5, 6, 7, 8, EOS, EOS, EOS], [9, 9, 9, 9, 9, 9, 9]], jnp.int32)
    batch = padded_batch(ids, prompt_lengths_B=jnp.array([2, 0]), lengths_B=jnp.array([5, 0]))
    log_probs_BT = jax.jit(answer_log_probs, static_argnums=0)(MODEL, policy, batch)
    hidden_1TD = jax.jit(MODEL.apply)(policy, ids[:1, :5])
    logits_TV = jax.jit(functools.partial(MODEL.apply, method="logits"))(policy, hidden_1TD)[0]
    expected = np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(4), ids[0, 1:5]]
    np.testing.assert_allclose(log_probs_BT[0, 2:5], expected[1:], rtol=0, atol=1e-5)
    assert not log_probs_BT[0, :2].any() and not log_probs_BT[0, 5:].any()
    assert not log_probs_BT[1].any()


def test_what_cannot_be_scored_is_refused(reward, answers):
    with pytest.raises(ValueError, match="prompt_length=3 must be 0 or more and below the 3"):
        GivenAnswer(np.arange(3, dtype=np.int32), 3)
    with pytest.raises(ValueError, match="rows_at_once=3 rows must be a multiple of the 8 shards"):
        Scorer(MODEL, reward, mesh=sharding.make_mesh(), rows_at_once=3)
    scorer = Scorer(MODEL, reward, mesh=_one_device(), rows_at_once=1)
    too_long = GivenAnswer(np.full(65, 4, np.int32), 1)
    with pytest.raises(ValueError, match=r"answers\[1\] has 65 tokens .* more than the model's 64"):
        scorer.scores([answers[0], too_long])
    with pytest.raises(ValueError, match=r"answers\[0\]: prompt_length=0"):
        scorer.log_probs([GivenAnswer(np.array([4], np.int32), 0)])
    assert scorer.scores([]).shape == (0,)


def test_angles_that_depend_on_the_batch_are_refused(reward):
    rope = RopeConfig(rope_type="dynamic", factor=2.0, original_max_positions=16)
    dynamic = Transformer(BackboneConfig.from_dict(CFG.to_dict() | {"rope": vars(rope)}))
    scorer = Scorer(dynamic, reward, mesh=_one_device(), rows_at_once=1)
    with pytest.raises(ValueError, match="scoring in batches to 17 tokens does not work"):
        scorer.scores([GivenAnswer(np.full(17, 4, np.int32), 1)])


def test_normalized_scores_have_mean_0_and_deviation_1_also_when_read_again(tmp_path):
    raw = np.array([3.0, 5.0, -1.0, 2.5])
    save_normalization(tmp_path, Normalization.of(raw, answers="four answers"))
    found = load_normalization(tmp_path)
    assert found.num_answers == 4 and found.answers == "four answers"
    scores = found.apply(raw)
    np.testing.assert_allclose([scores.mean(), scores.std()], [0, 1], atol=1e-12)
    assert load_normalization(tmp_path / "nowhere") is None


@pytest.mark.parametrize("scores", [[], [1.0], [2.0, 2.0], [0.1] * 3, [1.0, np.nan]])
def test_scores_without_a_spread_cannot_be_normalized(scores):
    with pytest.raises(ValueError, match="must be finite and differ"):
        Normalization.of(scores, answers="these answers")


def test_a_spoilt_normalization_is_an_error_and_not_ignored(tmp_path):
    path = tmp_path / "reward_normalization.json"
    fields = {"mean": 0.0, "standard_deviation": 0.0, "num_answers": 3, "answers": "x"}
    for content in ("{", json.dumps({"mean": 1.0}), json.dumps(fields)):
        path.write_text(content)
        with pytest.raises(ValueError, match="reward_normalization.json"):
            load_normalization(tmp_path)


def test_of_several_row_lengths_the_first_that_holds_the_longest_is_taken(reward, answers, alone):
    mesh = sharding.make_mesh()
    scorer = Scorer(MODEL, reward, mesh=mesh, rows_at_once=8, row_length=(16, 40, 64))
    short = [place for place, one in enumerate(answers) if len(one.token_ids) <= 16]
    for places in (range(len(answers)), short):
        found = scorer.scores([answers[place] for place in places])
        np.testing.assert_allclose(found, alone[list(places)], rtol=0, atol=1e-5)
    assert [scorer._plan(given).row_length for given in (answers, answers[:1])] == [40, 16]

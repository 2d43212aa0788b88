"""Several answers in a row: each token keeps its numbers, an update changes by rounding only."""

import types

import jax
import numpy as np
import pytest

from huatuo_jax.ppo.models import open_critic
from huatuo_jax.ppo.roles import abstract_roles, micro_batch_programs
from huatuo_jax.ppo.targets import RowShapes, packed_layout, plain_layout, row_counts
from huatuo_jax.training.initial_model import open_model
from tests.ppo.tiny import Table, config, run_tiny, tiny_job

WIDTH = 16


def _rollout(seed=0, answers=20):
    """Rows of a rollout in which no two tokens have the same number, and their lengths."""
    draw = np.random.default_rng(seed)
    lengths_N = draw.integers(2, WIDTH + 1, answers)
    is_token_NT = np.arange(WIDTH)[None, :] < lengths_N[:, None]
    numbers_NT = 1 + np.arange(answers * WIDTH).reshape(answers, WIDTH)
    return {
        "token_ids": np.where(is_token_NT, numbers_NT, 0).astype(np.int32),
        "segment_ids": is_token_NT.astype(np.int32),
        "positions": np.where(is_token_NT, np.arange(WIDTH)[None, :], 0).astype(np.int32),
        "mask": is_token_NT & (np.arange(WIDTH)[None, :] >= 1),
    }, lengths_N


def _layout(lengths_N, numbers_n, *, counts=tuple(range(1, 21))):
    return packed_layout(numbers_n, lengths_N[numbers_n], row_counts={WIDTH: counts})


def test_every_token_is_in_the_minibatch_once_and_comes_back_to_its_place():
    rollout, lengths_N = _rollout()
    numbers_n = np.random.default_rng(1).permutation(20)[:11]
    layout = _layout(lengths_N, numbers_n)
    packed = layout.pack(rollout)
    assert layout.num_rows < len(numbers_n)
    tokens = packed["token_ids"][packed["segment_ids"] > 0]
    wanted = rollout["token_ids"][numbers_n]
    assert sorted(tokens) == sorted(wanted[wanted > 0])
    back_NT = np.zeros_like(rollout["token_ids"])
    layout.unpack(packed["token_ids"], back_NT)
    np.testing.assert_array_equal(back_NT[numbers_n], wanted)
    others = np.setdiff1d(np.arange(20), numbers_n)
    assert not back_NT[others].any()


def test_a_segment_is_one_answer_from_its_first_position_to_its_last():
    rollout, lengths_N = _rollout()
    numbers_n = np.random.default_rng(2).permutation(20)[:13]
    packed = _layout(lengths_N, numbers_n).pack(rollout)
    seen = []
    for row, segments_T in enumerate(packed["segment_ids"]):
        found = [one for one in dict.fromkeys(segments_T.tolist()) if one]
        assert found == list(range(1, len(found) + 1))
        for segment in found:
            slots = np.flatnonzero(segments_T == segment)
            (answer,) = set(packed["answers"][row, slots].tolist())
            number = numbers_n[answer]
            length = lengths_N[number]
            np.testing.assert_array_equal(slots, np.arange(slots[0], slots[0] + length))
            for name in ("token_ids", "positions", "mask"):
                np.testing.assert_array_equal(
                    packed[name][row, slots], rollout[name][number, :length]
                )
            seen.append(answer)
    assert sorted(seen) == list(range(13))
    nothing = packed["segment_ids"] == 0
    assert (packed["answers"][nothing] == 13).all() and not packed["mask"][nothing].any()


def test_the_plain_layout_is_the_rollout_itself():
    rollout, lengths_N = _rollout()
    numbers_n = np.random.default_rng(3).permutation(20)[:8]
    packed = plain_layout(numbers_n, lengths_N[numbers_n], width=WIDTH).pack(rollout)
    for name, array_NT in rollout.items():
        np.testing.assert_array_equal(packed[name], array_NT[numbers_n])


@pytest.mark.parametrize(
    ("length", "shards", "width", "num_rows"),
    [
        (5, 8, 8, 16),  # Of the 8 wide rows that the mesh wants at least, 2 would be needed.
        (5, 1, 64, 2),  # A wide row can be had for itself.
        (33, 8, 48, 16),  # No two share a wide row, and fewer slots of a narrow one are empty.
    ],
)
def test_narrow_rows_are_taken_where_a_mesh_wants_more_rows_than_short_answers_need(
    length, shards, width, num_rows
):
    lengths_n = np.full(16, length)
    counts = row_counts(16, rows_at_once=16, shards=shards)
    narrow = 8 if length <= 8 else 48
    layout = packed_layout(np.arange(16), lengths_n, row_counts={64: counts, narrow: counts})
    assert (layout.width, layout.num_rows) == (width, num_rows)


@pytest.mark.parametrize(
    ("longest", "at_once", "shards", "packed", "in_one"),
    [
        (128, 32, 1, True, 8),  # 1,024 tokens.
        (128, 32, 8, True, 4),  # A row for each shard.
        (128, 24, 2, True, 4),  # Whole rows: 12 of a shard are 3 of 4 answers.
        (128, 8, 8, True, 1),
        (320, 32, 1, True, 2),
        (513, 32, 1, True, 1),
        (128, 32, 1, False, 1),
    ],
)
def test_a_row_has_room_for_several_longest_answers_and_a_micro_batch_for_as_many_tokens(
    longest, at_once, shards, packed, in_one
):
    shapes = RowShapes(
        num_answers=2 * at_once, longest=longest, rows_at_once=at_once, shards=shards, packed=packed
    )
    assert shapes.in_one == in_one and shapes.width == in_one * longest
    assert shapes.num_rows * shapes.width == 2 * at_once * longest
    assert shapes.at_once(shapes.width) * shapes.width == at_once * longest
    assert shapes.at_once(longest) == at_once
    assert shapes.at_once(shapes.width) % shards == 0


@pytest.mark.parametrize(
    ("lengths", "num_rows", "width"),
    [
        ([96] * 30, 3, 1024),  # 2,880 tokens; none of two shares a row of 128.
        ([96] * 32, 4, 768),  # Two more than 3 rows of 1,024 hold: no slot is empty.
        ([128] * 32, 4, 1024),
        ([40] * 32, 2, 640),
        ([20], 1, 48),  # A row of the rollout's own.
    ],
)
def test_short_rows_leave_little_padding(lengths, num_rows, width):
    shapes = RowShapes(num_answers=32, longest=128, rows_at_once=32, shards=1)
    counts = shapes.row_counts(narrow=48 if max(lengths) <= 48 else 128)
    layout = packed_layout(
        np.arange(len(lengths)),
        np.array(lengths),
        row_counts=counts,
        worth_another_width=shapes.worth_another_width,
    )
    assert (layout.num_rows, layout.width) == (num_rows, width)


@pytest.mark.parametrize(
    ("each", "num_rows", "width"),
    [
        (88, 3, 1024),  # 2,816 tokens fill 4 rows of 768 no better.
        (63, 2, 1024),
        (53, 2, 1024),  # Rows of 896 would save an eighth,
        (45, 2, 768),  # and those of 768 a quarter.
    ],
)
def test_another_width_is_compiled_only_where_it_saves_a_fifth(each, num_rows, width):
    shapes = RowShapes(num_answers=32, longest=128, rows_at_once=32, shards=1)
    layout = packed_layout(
        np.arange(32),
        np.full(32, each),
        row_counts=shapes.row_counts(narrow=128),
        worth_another_width=shapes.worth_another_width,
    )
    assert (layout.num_rows, layout.width) == (num_rows, width)
    assert (
        RowShapes(num_answers=32, longest=2048, rows_at_once=32, shards=1).worth_another_width == 0
    )


@pytest.mark.parametrize(
    ("longest", "narrow", "widths"),
    [
        (128, 64, [1024, 896, 768, 640, 64]),
        (320, 320, [640, 512, 384, 320]),
        (2048, 640, [2048, 640]),
    ],
)
def test_only_short_answers_have_rows_of_widths_between(longest, narrow, widths):
    shapes = RowShapes(num_answers=32, longest=longest, rows_at_once=32, shards=1)
    assert list(shapes.row_counts(narrow)) == widths


@pytest.mark.parametrize(
    ("longest", "size", "at_once", "shards"), [(128, 64, 16, 1), (100, 24, 12, 2), (700, 16, 8, 8)]
)
def test_any_answers_fit_in_whole_micro_batches_of_no_more_slots(longest, size, at_once, shards):
    shapes = RowShapes(num_answers=size, longest=longest, rows_at_once=at_once, shards=shards)
    draw = np.random.default_rng(0)
    for low in np.linspace(1, longest, 40).astype(int):
        lengths_n = draw.integers(low, longest + 1, size)
        layout = packed_layout(
            np.arange(size), lengths_n, row_counts=shapes.row_counts(narrow=int(lengths_n.max()))
        )
        rows_at_once = min(shapes.at_once(layout.width), layout.num_rows)
        assert layout.num_rows % rows_at_once == 0 and rows_at_once % shards == 0
        assert rows_at_once * layout.width <= at_once * longest
        assert layout.num_rows * layout.width <= size * longest
        used_R = np.bincount(layout.rows_n, lengths_n, layout.num_rows)
        assert used_R.max() <= layout.width


def test_the_largest_minibatch_is_the_one_that_memory_is_planned_by(tmp_path):
    shape = {"num_prompts": 8, "answers_per_prompt": 2, "max_new_tokens": 12}
    cfg = config(rollout=shape, micro_batch_size=4)
    job = tiny_job(cfg, tmp_path, scorer=Table({}))  # Nothing is scored.
    trainer, state = job.make_trainer(), job.make_state()
    whole = types.SimpleNamespace(rows={"segment_ids": np.ones((16, cfg.max_length), np.int32)})
    policy = open_model(cfg.model, cfg.compute.compute_config())
    critic = open_critic(cfg, policy, None)
    roles = abstract_roles(cfg, policy=policy, critic=critic, rewarding=None, mesh=trainer.mesh)
    for program in micro_batch_programs(roles):
        batch = program.arguments[2]
        assert batch["mask"].shape == (2, 4 * cfg.max_length)  # One row at once.
        for layout in trainer._layouts(state, whole, epoch=0):
            packed = layout.pack(whole.rows | {"mask": whole.rows["segment_ids"] > 0})
            assert packed["segment_ids"].all()
            for name, array in packed.items():
                assert (array.shape, array.dtype) == (batch[name].shape, batch[name].dtype)


@pytest.mark.parametrize(
    ("size", "at_once", "shards"), [(64, 16, 8), (128, 128, 8), (6, 3, 1), (5, 5, 5), (1, 1, 1)]
)
def test_rows_come_in_few_numbers_that_micro_batches_and_shards_divide(size, at_once, shards):
    counts = row_counts(size, rows_at_once=at_once, shards=shards)
    assert counts[-1] == size and counts[0] == shards
    assert all(count % (at_once if count > at_once else shards) == 0 for count in counts)
    assert len(counts) <= 1 + 2 * np.log2(2 * size / shards)
    for smaller, larger in zip(counts, counts[1:], strict=False):
        assert larger - smaller <= max(smaller / 2, at_once if larger > at_once else shards)


@pytest.mark.parametrize(
    "changed",
    [
        {"entropy_coef": 0.05, "denominator": "max_new_tokens"},
        pytest.param(
            {"estimator": "rloo", "kl_in": "sequence_square", "micro_batch_size": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"entropy_coef": 0.05, "kl_in": "k3", "denominator": "answers"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {
                "estimator": "grpo",
                "kl_in": "sequence_square",
                "denominator": "answers",
                "micro_batch_size": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["critic", "sequences in the loss", "mean of answers", "mean of micro-batches' answers"],
)
def test_packing_changes_only_rounding(changed, tmp_path):
    shape = {"num_prompts": 8, "answers_per_prompt": 2}
    found = {
        packed: run_tiny(
            config(packed=packed, num_iterations=2, rollout=shape, **changed),
            tmp_path / str(packed),
        )
        for packed in (True, False)
    }
    (packed, packed_fields), (plain, plain_fields) = found[True], found[False]
    leaves = [
        jax.tree.leaves([one.trained for one in (state.policy, state.value) if one is not None])
        for state in (packed, plain)
    ]
    for left, right in zip(*leaves, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=2e-5)
    assert packed_fields.keys() == plain_fields.keys()
    for name, value in plain_fields.items():
        assert packed_fields[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name

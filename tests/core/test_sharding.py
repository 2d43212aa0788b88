import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from huatuo_jax.backbone.config import BackboneConfig, ComputeConfig
from huatuo_jax.backbone.lora import LoraConfig, init_adapters
from huatuo_jax.backbone.transformer import Embedding, Transformer, abstract_params
from huatuo_jax.compiling import hlo
from huatuo_jax.core import sharding
from huatuo_jax.training.losses import score_tokens

ROOT = pathlib.Path(__file__).parents[2]
COMPUTE = ComputeConfig()


LLAMA = BackboneConfig(
    family="llama",
    vocab_size=90,
    vocab_multiple=8,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_positions=64,
    initializer_range=0.2,
)
QWEN2 = dataclasses.replace(LLAMA, family="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, family="qwen3", qk_norm=True, tie_embeddings=True)
BLOOM = dataclasses.replace(
    LLAMA,
    family="bloom",
    num_kv_heads=8,
    norm="layer",
    activation="gelu_tanh",
    gated_mlp=False,
    position="alibi",
    rope=None,
    embedding_norm=True,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    tie_embeddings=True,
)
BIASED_LLAMA = dataclasses.replace(LLAMA, qkv_bias=True, output_bias=True, mlp_bias=True)
BAICHUAN2 = dataclasses.replace(
    LLAMA, family="baichuan2", num_kv_heads=8, position="alibi", rope=None, norm_head=True
)
FAMILIES = (LLAMA, BIASED_LLAMA, QWEN2, QWEN3, BLOOM, BAICHUAN2)

ALL_TARGETS = LoraConfig(rank=2, alpha=4.0)
UNGATED_TARGETS = LoraConfig(
    rank=2, alpha=4.0, targets=("query", "key", "value", "output", "up", "down")
)


def every_parameter() -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter that any family, head or adapter makes."""
    trees: list[Any] = []
    for cfg in FAMILIES:
        trees += [abstract_params(cfg, COMPUTE, head=head) for head in ("lm", "score")]
        lora = ALL_TARGETS if cfg.gated_mlp else UNGATED_TARGETS
        trees.append(
            jax.eval_shape(functools.partial(init_adapters, cfg=cfg, lora=lora), jax.random.key(0))
        )
    return {
        sharding.path_name(path): leaf.shape
        for tree in trees
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_every_parameter_of_every_family_has_exactly_one_rule_of_its_rank():
    for path, shape in every_parameter().items():
        assert len(sharding.parameter_spec(path)) == len(shape), path


def test_no_rule_and_no_alternative_inside_a_rule_matches_nothing():
    paths = every_parameter()
    for rule, _ in sharding.PARAMETER_RULES:
        matched = [path for path in paths if re.search(f"(^|/){rule}$", path)]
        assert matched, rule
        for word in re.findall(r"\w+", rule):
            assert any(word in path for path in matched), f"{word} of {rule}"


@pytest.mark.parametrize("path", ["layers/attention/qkv/weight", "my_lm_head/kernel", "kernel"])
def test_a_parameter_without_a_rule_is_an_error(path):
    with pytest.raises(ValueError, match=f"0 partition rules match parameter '{path}'"):
        sharding.parameter_spec(path)


def test_a_dimension_that_does_not_divide_names_parameter_dimension_and_axis():
    params = abstract_params(LLAMA, COMPUTE)
    mesh = AbstractMesh((1, 1, 3), sharding.AXES, (AxisType.Auto,) * 3)
    with pytest.raises(ValueError) as caught:
        sharding.parameter_shardings({"layers": {"mlp": params["layers"]["mlp"]}}, mesh)
    assert str(caught.value) == (
        "parameter 'layers/mlp/down/kernel': dimension 1 of (2, 64, 32) is 64, which mesh axis "
        "'tensor' of size 3 does not divide"
    )


def test_a_parameter_of_another_rank_than_its_rule_is_an_error():
    tree = {"lm_head": {"kernel": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    with pytest.raises(ValueError, match=r"'lm_head/kernel' does not fit its shape \(4,\)"):
        sharding.parameter_shardings(tree, sharding.make_mesh())


def test_the_hosts_mesh_is_its_cpu_alone():
    mesh = sharding.host_mesh()
    assert mesh.size == 1 and mesh.devices.item() == jax.local_devices(backend="cpu")[0]


def test_a_host_whose_cpu_jax_may_not_use_is_told_how_to_let_it(monkeypatch):
    def without_cpu(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", without_cpu)
    with pytest.raises(ValueError, match="leave JAX_PLATFORMS unset"):
        sharding.host_mesh()


def test_several_cpu_devices_never_run_a_program_from_the_compilation_cache(tmp_path):
    program = (
        "import jax; from huatuo_jax.core import sharding\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "jax.jit(lambda x: x + 1)(1)\n"
        "before = len(os.listdir(folder))\n"
        "place = sharding.batch_sharding(sharding.make_mesh())\n"
        "jax.jit(lambda x: x.sum())(jax.device_put(jax.numpy.ones((2, 2)), place))\n"
        "print(before, len(os.listdir(folder)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"import os; folder = {str(tmp_path)!r}\n{program}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, result.stdout.split())
    assert before == after > 0


@pytest.mark.parametrize(("num_devices", "cached"), [(1, True), (8, False)])
def test_of_the_tests_programs_only_those_of_one_device_are_cached(num_devices, cached):
    sharding.make_mesh()
    mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])

    def total(x):
        return x.sum()

    # The name of a program is the beginning of its file's.
    total.__name__ = f"total_{os.getpid()}_{time.time_ns()}"
    rows = jax.device_put(np.ones((8, 2), np.float32), sharding.batch_sharding(mesh))
    assert jax.jit(total)(rows) == 16
    folder = pathlib.Path(jax.config.jax_compilation_cache_dir)
    assert any(folder.glob(f"*{total.__name__}*")) == cached


def test_make_mesh_fills_the_free_axis():
    assert sharding.make_mesh().devices.shape == (1, 8, 1)
    assert sharding.make_mesh(data=2, fsdp=2, tensor=-1).devices.shape == (2, 2, 2)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert mesh.devices.shape == (1, 1, 1) and mesh.axis_names == ("data", "fsdp", "tensor")


def test_a_mesh_of_one_takes_the_first_device():
    assert sharding.MeshConfig(fsdp=1).make().devices.tolist() == [[[jax.devices()[0]]]]
    named = jax.devices()[4:]
    assert sharding.MeshConfig(fsdp=1).make(named).devices.tolist() == [[[named[0]]]]
    with pytest.raises(ValueError, match="needs 2 devices, there are 8"):
        sharding.MeshConfig(fsdp=2).make()


def test_of_several_processes_none_is_left_without_a_device():
    devices = [types.SimpleNamespace(process_index=index // 4) for index in range(8)]
    with pytest.raises(ValueError, match="needs 1 devices, there are 8"):
        sharding.MeshConfig(fsdp=1).make(devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3, "fsdp": 1}, "mesh data=3 x fsdp=1 x tensor=1 needs 3 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "only one mesh axis may be -1, not data and fsdp"),
        ({"data": 0}, "mesh.data=0 must be at least 1"),
        ({"tensor": -2}, "mesh.tensor=-2 must be at least 1"),
        ({"tensor": 16}, "mesh.fsdp=-1: the other axes take 16 devices"),
        ({"tensor": 3}, "mesh.fsdp=-1: the other axes take 3 devices"),
    ],
)
def test_a_mesh_that_cannot_be_says_why(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.make_mesh(**sizes)


def test_an_optimizer_state_is_split_like_its_parameters():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = abstract_params(QWEN3, COMPUTE)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = sharding.parameter_shardings(jax.eval_shape(optimizer.init, params), mesh)
    wanted = sharding.parameter_shardings(params, mesh)
    adam = state[1][0]
    assert adam.mu == wanted and adam.nu == wanted
    assert adam.count.spec == P()


class Chip:
    """What a mesh asks of a TPU's device."""

    platform, device_kind, core_on_chip, process_index = "tpu", "TPU v5 lite", 0, 0

    def __init__(self, slice_index: int, x: int, y: int) -> None:
        self.slice_index, self.coords, self.id = (
            slice_index,
            (x, y, 0),
            16 * slice_index + 4 * x + y,
        )


@pytest.mark.parametrize(
    ("num_slices", "sizes", "slices"),
    [
        # A block of `fsdp` and `tensor` for each index of `data`: the slices that it lies on.
        (2, (2, 16, 1), [{0}, {1}]),
        (2, (4, 4, 2), [{0}, {0}, {1}, {1}]),
        (2, (1, 32, 1), [{0, 1}]),
        (4, (2, 8, 4), [{0, 1}, {2, 3}]),
    ],
)
def test_slices_divide_data_before_fsdp(num_slices, sizes, slices):
    chips = [Chip(*place) for place in np.ndindex(num_slices, 4, 4)]
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=chips)
    assert mesh.devices.shape == sizes
    assert [{chip.slice_index for chip in block.flat} for block in mesh.devices] == slices
    for group in mesh.devices.reshape(-1, tensor):
        assert len({chip.slice_index for chip in group}) == 1


def test_tensor_does_not_span_slices():
    chips = [Chip(*place) for place in np.ndindex(2, 4, 4)]
    with pytest.raises(ValueError, match="`tensor` would span slices; let data=2"):
        sharding.make_mesh(tensor=32, fsdp=1, devices=chips)


def test_constrain_outside_a_mesh_is_the_identity():
    array = jnp.ones((3, 5, 7))
    assert sharding.constrain(array, "hidden_BTD") is array
    with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert sharding.constrain(array, "hidden_BTD") is array


def test_constrain_leaves_what_does_not_divide_to_the_compiler():
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        constrained = jax.jit(lambda x: sharding.constrain(x, "heads_BTNH"))
        np.testing.assert_array_equal(constrained(jnp.ones((3, 2, 5, 4))), np.ones((3, 2, 5, 4)))
        split = constrained(jnp.ones((4, 2, 6, 4)))
    assert split.sharding.shard_shape(split.shape) == (1, 2, 3, 4)


def packed_batch(rows: int = 8, length: int = 24) -> dict[str, jax.Array]:
    """Rows of two or three segments of unequal lengths and some padding at the end."""
    generator = np.random.default_rng(0)
    segments_BT = np.zeros((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(generator.choice(np.arange(2, length), size=3, replace=False))
        for segment, (start, end) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments_BT[row, start:end] = segment + 1
    tokens_BT = generator.integers(0, LLAMA.vocab_size, (rows, length), dtype=np.int32)
    return {"tokens_BT": jnp.asarray(tokens_BT), "segments_BT": jnp.asarray(segments_BT)}


def mean_loss(trained: Any, frozen: Any, batch: Any, *, cfg: BackboneConfig, lora: Any) -> Any:
    """Mean cross-entropy of the next token within its segment."""
    model = Transformer(cfg, COMPUTE, lora)
    variables = {"params": trained} if lora is None else {"params": frozen, "lora": trained}
    tokens_BT, segments_BT = batch["tokens_BT"], batch["segments_BT"]
    hidden_BTD = model.apply(variables, tokens_BT, segment_ids_BT=segments_BT)
    head = model.apply(variables, method="head")
    logits_BTV = model.apply(variables, hidden_BTD[:, :-1], head, method="logits")
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    counted_BT = (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] > 0)
    return jnp.sum(losses_BT * counted_BT) / counted_BT.sum()


CASES: dict[str, tuple[BackboneConfig, LoraConfig | None]] = {
    "llama": (LLAMA, None),
    "bloom": (BLOOM, None),
    "qwen3_lora": (QWEN3, ALL_TARGETS),
}


def abstract_case(name: str) -> tuple[Any, Any, Any]:
    """Shapes of what is trained and what is frozen, and the loss with its gradient."""
    cfg, lora = CASES[name]
    trained, frozen = abstract_params(cfg, COMPUTE), {}
    if lora is not None:
        make = functools.partial(init_adapters, cfg=cfg, lora=lora)
        trained, frozen = jax.eval_shape(make, jax.random.key(0)), trained
    loss = jax.value_and_grad(functools.partial(mean_loss, cfg=cfg, lora=lora))
    return trained, frozen, jax.jit(loss)


@functools.cache
def case(name: str) -> tuple[Any, Any, Any, Any]:
    """Weights, the loss with its gradient, and what one device makes of them."""
    *shapes, loss = abstract_case(name)
    generator = np.random.default_rng(1)
    trained, frozen = jax.tree.map(
        lambda x: generator.normal(scale=0.2, size=x.shape).astype(np.float32), shapes
    )
    with jax.default_matmul_precision("highest"):
        return trained, frozen, loss, loss(trained, frozen, packed_batch())


MESHES = [(8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2)]
FAST = [("llama", (1, 2, 4)), ("qwen3_lora", (2, 2, 2))]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        pytest.param(name, sizes, marks=() if (name, sizes) in FAST else pytest.mark.slow)
        for name in CASES
        for sizes in MESHES
    ],
)
def test_loss_and_gradients_on_a_mesh_equal_those_of_one_device(name, sizes):
    trained, frozen, loss, (loss_alone, gradients_alone) = case(name)
    mesh = sharding.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    trained, frozen = (
        jax.device_put(tree, sharding.parameter_shardings(tree, mesh)) for tree in (trained, frozen)
    )
    batch = jax.device_put(packed_batch(), sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        loss_on_mesh, gradients = jax.block_until_ready(loss(trained, frozen, batch))
    np.testing.assert_allclose(loss_on_mesh, loss_alone, rtol=1e-6)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        alone = gradients_alone
        for key in path:
            alone = alone[key.key]
        difference = np.linalg.norm(np.asarray(gradient) - np.asarray(alone))
        norm = np.linalg.norm(alone)
        assert norm > 0 and difference <= 1e-5 * norm, sharding.path_name(path)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_loss_in_chunks_gathers_the_head_once(dtype):
    rows, length = 8, 24
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = Transformer(LLAMA, dataclasses.replace(COMPUTE, compute_dtype=dtype))
    params = abstract_params(LLAMA, model.compute)
    row = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=sharding.batch_sharding(mesh))
    batch = dict.fromkeys(("token_ids", "segment_ids", "positions"), row)

    def loss(params: Any, batch: Any) -> Any:
        mask_BT = batch["segment_ids"] > 0
        scores = score_tokens(model, {"params": params}, batch, mask_BT, chunk=6)
        return scores.log_probs_BT.sum()

    with jax.set_mesh(mesh):
        placed = _placed(params, sharding.parameter_shardings(params, mesh))
        compiled = jax.jit(jax.grad(loss)).lower(placed, batch).compile()
    found = hlo.collectives_of(hlo.parse(compiled.as_text()), mesh, num_layers=LLAMA.num_layers)
    shard = (LLAMA.hidden_size, LLAMA.padded_vocab_size // 2)
    gathered = [one.runs for one in found if one.kind == "all-gather" and one.dims == shard]
    assert gathered == [1]


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_a_lookup_sends_the_embeddings_of_tokens_and_never_the_table(sizes):
    rows, length = 16, 4
    mesh = sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    module = Embedding(LLAMA, COMPUTE)
    shape = (LLAMA.padded_vocab_size, LLAMA.hidden_size)
    params = {"embedding": {"table": jax.ShapeDtypeStruct(shape, COMPUTE.param_dtype)}}
    tokens_BT = jax.ShapeDtypeStruct(
        (rows, length), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )

    def loss(params: Any, tokens_BT: jax.Array) -> jax.Array:
        found_BTD = module.apply({"params": params["embedding"]}, tokens_BT)
        return jnp.sin(found_BTD).sum()

    with jax.set_mesh(mesh):
        shardings = sharding.parameter_shardings(params, mesh)
        gradient = jax.jit(jax.grad(loss), out_shardings=shardings)
        compiled = gradient.lower(_placed(params, shardings), tokens_BT).compile()
    found = hlo.collectives_of(hlo.parse(compiled.as_text()), mesh, num_layers=1)
    assert [one.kind for one in found].count("all-to-all") == 2
    # Of the table each device holds its part, whose gradients the copies of `data` add up.
    of_table = [one for one in found if one.dims[0] in (shape[0], shape[0] // sizes[2])]
    assert [(one.kind, one.axes) for one in of_table] == [("all-reduce", ("data",))][: sizes[0] - 1]


def compile_everywhere() -> None:
    """Compile each case on each mesh, then something no compiler can reshard piece by piece."""
    for name in CASES:
        trained, frozen, loss = abstract_case(name)
        for data, fsdp, tensor in MESHES:
            mesh = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
            trees = [
                _placed(tree, sharding.parameter_shardings(tree, mesh))
                for tree in (trained, frozen)
            ]
            batch = packed_batch()
            rows = jax.tree.map(lambda _, mesh=mesh: sharding.batch_sharding(mesh), batch)
            with jax.set_mesh(mesh):
                loss.lower(*trees, _placed(batch, rows)).compile()
    print("what follows is meant to warn", file=sys.stderr, flush=True)

    def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        split_VD = jax.lax.with_sharding_constraint(table_VD, P("tensor", "fsdp"))
        return sharding.constrain(jnp.take(split_VD, tokens_BT, axis=0), "hidden_BTD")

    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        jax.jit(lookup).lower(jnp.ones((64, 32)), jnp.ones((8, 4), jnp.int32)).compile()


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
    )


@pytest.mark.slow
def test_the_compiler_never_replicates_an_activation_to_reshard_it():
    # Its warnings come from C++, and only when it really compiles: hence a process of its own.
    finished = subprocess.run(
        [sys.executable, __file__],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": "8",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "0",
        },
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    ours, _, control = finished.stderr.partition("what follows is meant to warn")
    assert "Involuntary full rematerialization" in control
    assert "Involuntary full rematerialization" not in ours


if __name__ == "__main__":
    compile_everywhere()


def test_a_mesh_divides_a_shape_where_each_axis_divides_its_dimension():
    spec = P(sharding.BATCH_AXES, None, "tensor")
    assert sharding.divides(spec, (3, 5, 7))  # Without a mesh nothing has to be divided.
    with jax.set_mesh(sharding.make_mesh(data=2, fsdp=2, tensor=2)):
        assert sharding.divides(spec, (8, 5, 2))
        assert not sharding.divides(spec, (6, 5, 2))
        assert not sharding.divides(spec, (8, 5, 3))

"""AdamW with warm-up, decay and clipping by the global norm of the gradients."""

import dataclasses
import math
import re
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from huatuo_jax.core import sharding

Decay = Literal["cosine", "linear", "constant"]

_NOT_DECAYED = re.compile(r"(^|/)(scale|bias)$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and its schedule.

    Attributes:
        learning_rate: the highest one, reached at the end of the warm-up.
        decay: how it falls after the warm-up: `cosine` (arXiv 1608.03983), `linear`, `constant`.
        final_share: the share of `learning_rate` it falls to; not with `constant`.
        warmup_share: share of all updates that the linear warm-up takes; the updates are rounded
            up.
        warmup_steps: updates that it takes, instead of a share.
        weight_decay: the learning rate times this is the share of itself each weight loses in an
            update; norms and biases lose nothing.
        beta1: decay of the mean of gradients.
        beta2: decay of the mean of their squares.
        epsilon: added to the root of the mean of squares.
        clip_norm: a gradient whose global norm is larger is scaled down to it; None for no bound.
    """

    learning_rate: float
    decay: Decay = "cosine"
    final_share: float = 0.0
    warmup_share: float | None = None
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for a field out of its range."""
        if self.decay not in get_args(Decay):
            raise _wrong("decay", self.decay, f"one of {list(get_args(Decay))}")
        for name in ("learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise _wrong(name, value, "above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise _wrong("weight_decay", self.weight_decay, "0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise _wrong(name, getattr(self, name), "at least 0 and below 1")
        if not 0 <= self.final_share <= 1:
            raise _wrong("final_share", self.final_share, "between 0 and 1")
        if self.decay == "constant" and self.final_share != 0:
            raise _wrong("final_share", self.final_share, "left out for decay='constant'")
        if self.warmup_share is not None and self.warmup_steps is not None:
            raise _wrong("warmup_steps", self.warmup_steps, "None where warmup_share is given")
        if self.warmup_share is not None and not 0 <= self.warmup_share <= 1:
            raise _wrong("warmup_share", self.warmup_share, "between 0 and 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise _wrong("warmup_steps", self.warmup_steps, "0 or more")

    def num_warmup_steps(self, num_steps: int) -> int:
        """Counts the updates of the warm-up, of `num_steps` in all.

        Raises:
            ValueError: `warmup_steps` is more than all of them.
        """
        steps = self.warmup_steps or 0
        if self.warmup_share is not None:
            steps = math.ceil(self.warmup_share * num_steps)
        if steps > num_steps:
            raise _wrong("warmup_steps", steps, f"at most the {num_steps} updates of the run")
        return steps


def _wrong(name: str, value: object, right: str) -> ValueError:
    return ValueError(f"OptimizerConfig.{name}={value!r} must be {right}")


def learning_rate(update: jax.typing.ArrayLike, cfg: OptimizerConfig, num_steps: int) -> jax.Array:
    """Returns the learning rate of one update, counted from 0.

    With w warm-up updates of n in all and peak p it is `p (u + 1) / w` before update w, and from
    there on, with `s = (u - w) / (n - w)` going from 0 to 1, `p (f + (1 - f) d(s))` where f is
    `final_share` and d is `(1 + cos(pi s)) / 2`, `1 - s` or 1. Past n it stays at its last value.

    Args:
        update: updates applied so far.
        cfg: the schedule.
        num_steps: updates in all.

    Returns:
        A float of jax's default width.
    """
    warmup = cfg.num_warmup_steps(num_steps)
    done = jnp.asarray(update).astype(float)
    share = jnp.clip((done - warmup) / max(num_steps - warmup, 1), 0.0, 1.0)
    if cfg.decay == "cosine":
        left = (1.0 + jnp.cos(jnp.pi * share)) / 2.0
    elif cfg.decay == "linear":
        left = 1.0 - share
    else:
        left = jnp.ones_like(share)
    decayed = cfg.final_share + (1.0 - cfg.final_share) * left
    warming = jnp.minimum((done + 1.0) / max(warmup, 1), 1.0)
    return cfg.learning_rate * jnp.where(done < warmup, warming, decayed)


class Optimizer(NamedTuple):
    """The optimizer of an update; made by `make_optimizer`."""

    cfg: OptimizerConfig
    num_steps: int
    transformation: optax.GradientTransformation

    def learning_rate(self, update: jax.typing.ArrayLike) -> jax.Array:
        """Returns the learning rate of one update, counted from 0."""
        return learning_rate(update, self.cfg, self.num_steps)

    def step(
        self, gradients: Any, opt_state: Any, trained: Any, *, applied: jax.Array
    ) -> tuple[Any, Any]:
        """Returns parameters and state after an update, or as they are if it is not applied.

        Args:
            gradients: like the parameters.
            opt_state: of the transformation.
            trained: the parameters.
            applied: bool, whether the gradients are of use.
        """
        transformation = optax.with_extra_args_support(self.transformation)
        changes, new_state = transformation.update(gradients, opt_state, trained, applied=applied)

        def kept(new: Any, old: Any) -> Any:
            if _is_adam(new):  # Has looked at `applied` itself.
                return new
            return jnp.where(applied, new, old)

        new_trained = jax.tree.map(kept, optax.apply_updates(trained, changes), trained)
        return new_trained, jax.tree.map(kept, new_state, opt_state, is_leaf=_is_adam)


def make_optimizer(cfg: OptimizerConfig, *, num_steps: int) -> Optimizer:
    """Makes AdamW for a run of `num_steps` updates; its state has the paths of the parameters.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    cfg.num_warmup_steps(num_steps)
    transformation = optax.chain(
        _scale_by_adam(cfg),
        optax.add_decayed_weights(cfg.weight_decay, mask=is_decayed),
        optax.scale_by_learning_rate(lambda update: learning_rate(update, cfg, num_steps)),
    )
    return Optimizer(cfg, num_steps, transformation)


def schedule_position(opt_state: Any, default: jax.Array) -> jax.Array:
    """Returns the update that an optimizer's schedule comes to next, counted from 0.

    Args:
        opt_state: of `make_optimizer`'s transformation.
        default: for a transformation whose learning rate has no schedule.
    """
    found = [*filter(_is_schedule, jax.tree.leaves(opt_state, is_leaf=_is_schedule))]
    return jnp.asarray(found[0].count) if found else default


def advance_schedule(opt_state: Any, updates: int) -> Any:
    """Moves the schedule in an optimizer's state so many updates further on.

    For updates that were planned and are not taken. Adam's own count, that of the gradients it has
    seen, stays as it is.
    """
    if not updates:
        return opt_state
    return jax.tree.map(
        lambda leaf: leaf._replace(count=leaf.count + updates) if _is_schedule(leaf) else leaf,
        opt_state,
        is_leaf=_is_schedule,
    )


def is_decayed(params: Any) -> Any:
    """Says of each parameter of a tree, by its path, whether weight decay applies to it."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _NOT_DECAYED.search(sharding.path_name(path)) is None, params
    )


def clip_by_norm(gradients: Any, norm: jax.Array, clip_norm: float | None) -> Any:
    """Scales gradients down to a global norm of `clip_norm`, if theirs is larger.

    Args:
        gradients: any tree.
        norm: its global norm.
        clip_norm: None leaves them as they are.
    """
    if clip_norm is None:
        return gradients
    # Where the norm is within the bound the factor is exactly 1.
    factor = clip_norm / jnp.maximum(norm, clip_norm)
    return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), gradients)


def _scale_by_adam(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Returns `optax.scale_by_adam`, whose update takes `applied` and writes moments in place.

    Not applied, the state is as before and the changes have no meaning. XLA:CPU would compute the
    changes from the old moments once more, as parts of the parameters' update, and so copy all
    moments before they are replaced; here the changes are made of the moments as they are stored.
    """
    beta1, beta2 = cfg.beta1, cfg.beta2

    def update(
        gradients: Any, state: optax.ScaleByAdamState, params: Any = None, *, applied: Any = True
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params
        new = optax.ScaleByAdamState(
            count=optax.safe_increment(state.count),
            mu=optax.tree.update_moment(gradients, state.mu, beta1, 1),
            nu=optax.tree.update_moment_per_elem_norm(gradients, state.nu, beta2, 2),
        )
        stored = jax.tree.map(lambda a, b: jnp.where(applied, a, b), new, state)
        if sharding.platform_in_use() == "cpu":
            stored = jax.lax.optimization_barrier(stored)
        mean = optax.tree.bias_correction(stored.mu, beta1, new.count)
        square = optax.tree.bias_correction(stored.nu, beta2, new.count)
        changes = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + cfg.epsilon), mean, square)
        return changes, stored

    init = optax.scale_by_adam(b1=beta1, b2=beta2, eps=cfg.epsilon).init
    return optax.GradientTransformationExtraArgs(init, update)


def _is_adam(node: Any) -> bool:
    return isinstance(node, optax.ScaleByAdamState)


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)

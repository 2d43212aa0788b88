"""HuatuoGPT in JAX: supervised fine-tuning, AI feedback, a reward model and PPO.

The names below are the Python API; each is imported when it is first used, so that importing
the package is cheap. Everything else is a deep import, as `from huatuo_jax.sft import SftConfig`.
"""

import importlib
import logging
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huatuo_jax.api.in_use import LogProbs, Response
    from huatuo_jax.api.models import Chat, Model, RewardModel, load_model, load_reward_model
    from huatuo_jax.api.stages import dpo, ppo, run_recipe, sft, train_reward_model
    from huatuo_jax.recipe.base_model import recipe

__all__ = [
    "Chat",
    "LogProbs",
    "Model",
    "Response",
    "RewardModel",
    "dpo",
    "load_model",
    "load_reward_model",
    "ppo",
    "recipe",
    "run_recipe",
    "sft",
    "train_reward_model",
]

# transformers, of which the package takes tokenizers and configs, says when it is imported without
# PyTorch that there are no models. The models are the package's own and need no PyTorch.
logging.getLogger("transformers").addFilter(
    lambda record: not str(record.msg).startswith("PyTorch was not found")
)

_MODULES = {
    "in_use": ("LogProbs", "Response"),
    "models": ("Chat", "Model", "RewardModel", "load_model", "load_reward_model"),
    "stages": ("dpo", "ppo", "run_recipe", "sft", "train_reward_model"),
}
_PLACES = {name: f"{__name__}.api.{module}" for module, names in _MODULES.items() for name in names}
_PLACES["recipe"] = f"{__name__}.recipe.base_model"


def __getattr__(name: str) -> Any:
    """Imports a name of the API."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """Returns the names of the API, and those of imported submodules."""
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """A package in which a name of the API is not hidden by a submodule of the same name.

    `huatuo_jax.sft` is the function, imported before or after the module of that name, which
    `from huatuo_jax.sft import ...` gives.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, unless the import system binds such a submodule."""
        if not (name in _PLACES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

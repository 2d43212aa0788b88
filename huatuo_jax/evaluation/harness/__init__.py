"""Connects lm-evaluation-harness to our engine and scorer, as its model `huatuo`; without torch.

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from huatuo_jax.evaluation.harness import TASKS

manager = TaskManager(include_path=TASKS, metadata={"cmb": "CMB-val-merge.json"})
simple_evaluate("huatuo", {"pretrained": "DIR"}, tasks=["huatuo_cmb"], task_manager=manager)
"""

from huatuo_jax.evaluation.harness.model import TASKS, HuatuoLM

__all__ = ["TASKS", "HuatuoLM"]

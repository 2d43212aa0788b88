"""What a stage of the recipe takes for written, in a bucket too."""

from huatuo_jax.checkpoint.models import find_model
from huatuo_jax.core import folders
from huatuo_jax.core.files import as_path, write_file
from huatuo_jax.recipe import stages
from tests.recipe.tiny import tiny_recipe, write_dialogues


def test_a_base_model_whose_write_was_killed_is_written_anew(tmp_path, bucket):
    data = tmp_path / "mine.jsonl"
    write_dialogues(data)
    target = as_path("gs://bucket/run/base/model")
    write_file(target / ".unfinished", "")  # As a process that is killed leaves it.
    write_file(target / "params" / "half", "of it")
    for _ in range(2):
        stages._save_base(tiny_recipe(data), target)
        assert find_model(target).head == "lm" and folders.is_written(target)
        assert not (target / "params" / "half").exists()

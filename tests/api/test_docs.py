"""The page of the Python surface runs as it is printed, on tiny models."""

import pathlib
import re

import pytest

import huatuo_jax as hj
from tests.api import tiny
from tests.test_notebook import TINY

PAGE = pathlib.Path(hj.__file__).resolve().parents[1] / "docs" / "python.md"
HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"
SMALL = {name.replace(".", "__"): value for name, value in TINY.items() if name != "sft.num_steps"}


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_page_names_the_whole_surface():
    text = PAGE.read_text(encoding="utf-8")
    for name in hj.__all__:
        assert f"`{name}" in text
    for owner in (hj.Model, hj.RewardModel):
        methods = [name for name in vars(owner) if name[0] != "_" and callable(vars(owner)[name])]
        for name in methods:
            assert f"`{owner.__name__}.{name}`" in text


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
def test_its_examples_run(tmp_path, monkeypatch, capsys):
    tiny.save(tmp_path / "runs" / "demo" / "ppo" / "model", "lm", max_positions=512)
    tiny.save(tmp_path / "runs" / "demo" / "reward" / "model", "score")
    base = tiny.save(tmp_path / "base", "lm", max_positions=512)
    monkeypatch.chdir(tmp_path)
    names = {"hj": hj, "SMALL": SMALL}
    for block in blocks():
        text = block.replace(HUB_ID, str(base)).replace(
            "__num_epochs=1)", "__num_epochs=1, **SMALL)"
        )
        exec(compile(text, str(PAGE), "exec"), names)
    assert len(names["groups"]) == 2 and len(names["groups"][0]) == 4
    assert (tmp_path / "exported" / "policy" / "generation_config.json").is_file()
    assert (tmp_path / "runs" / "mine" / "ppo" / "model").is_dir()
    assert (tmp_path / "runs" / "recipe" / "report.html").is_file()
    assert capsys.readouterr().out

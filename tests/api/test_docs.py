"""The page of the Python surface runs as it is printed, on tiny models."""

import pathlib
import re

import pytest

import huatuo_jax as hj
from tests.api import tiny

PAGE = pathlib.Path(hj.__file__).resolve().parents[1] / "docs" / "python.md"
HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"


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
    names = {"hj": hj}
    for block in blocks():
        exec(compile(block.replace(HUB_ID, str(base)), str(PAGE), "exec"), names)
    assert len(names["groups"]) == 2 and len(names["groups"][0]) == 4
    assert (tmp_path / "exported" / "policy" / "generation_config.json").is_file()
    assert (tmp_path / "runs" / "mine" / "ppo" / "model").is_dir()
    assert capsys.readouterr().out

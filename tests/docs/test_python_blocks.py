"""Every Python block of the README and of the pages, in the order of its page, on tiny models."""

import re

import pytest

import huatuo_jax as hj
from tests.api import tiny
from tests.docs import pages

# tests/api/test_docs.py runs the blocks of python.md.
WITH_BLOCKS = [page for page in pages.PAGES if pages.blocks(page, "python")]
RUN_HERE = [page for page in WITH_BLOCKS if page.name != "python.md"]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.stem)
def test_every_block_is_python_and_takes_names_that_there_are(page):
    for block in pages.blocks(page, "python"):
        compile(block, str(page), "exec")
        for name in re.findall(r"\bhj\.(\w+)", block):
            assert name in hj.__all__, f"{page.name}: hj.{name}"


def test_the_page_of_the_surface_is_among_them():
    assert {page.name for page in WITH_BLOCKS} >= {"README.md", "python.md", "first_run.md"}


@pytest.mark.slow
@pytest.mark.usefixtures("on_one_device")
@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch, capsys):
    tiny.save(tmp_path / "runs" / "demo" / "ppo" / "model", "lm", max_positions=512)
    tiny.save(tmp_path / "runs" / "demo" / "reward" / "model", "score")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in pages.blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    assert capsys.readouterr().out

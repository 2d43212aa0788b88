"""The pages of the site: what is generated is whole, and what is written is true."""

import contextlib
import dataclasses
import json
import re
import sys

import pytest

import huatuo_jax as hj
from huatuo_jax import cli
from huatuo_jax.backbone.config import PRESETS
from huatuo_jax.core.config import is_config
from huatuo_jax.data.readers import ALL_FORMATS
from tests.docs import generated, pages


@pytest.fixture(scope="module")
def reference():
    """The reference pages by their paths."""
    return generated.load("reference_pages").pages()


def test_the_map_names_every_file_and_no_other():
    text = generated.load("map_page").page(pages.ROOT)
    named, folder = set(), "huatuo_jax/"
    for line in text.splitlines():
        if line.startswith("## Floor "):
            folder = "huatuo_jax/"
        elif found := re.match(r"### `([\w/]+/)`", line):
            beside = found[1].rstrip("/") in ("launch", "configs", "benchmarks")
            folder = found[1] if beside else f"huatuo_jax/{found[1]}"
        elif found := re.match(r"\| `([\w/.]+\.py)` \| \S", line):
            named.add(folder + found[1])
    there = {
        str(path.relative_to(pages.ROOT))
        for folder in ("huatuo_jax", "launch", "benchmarks", "configs")
        for path in (pages.ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == there


def test_a_file_without_a_docstring_has_no_place_on_the_map(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="empty.py: no docstring"):
        generated.load("map_page").sentence(tmp_path / "empty.py")


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_tables_are_made_of_the_results_as_they_stand(page):
    text = pages.text_of(page)
    assert generated.tables().filled(text) == text, "run benchmarks/tables.py"


def test_every_table_has_its_place():
    named = {
        name
        for page in pages.PAGES
        for name in re.findall(r"<!-- table: (\w+) -->", pages.text_of(page))
    }
    assert named == set(generated.tables().TABLES)


def test_a_table_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="table: speeds --> must be one of speed, "):
        generated.tables().filled("<!-- table: speeds -->\n<!-- end of table -->\n")


def test_tests_that_are_named_are_there():
    found = {
        name
        for path in (pages.ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^ *def (test_\w+)", path.read_text(encoding="utf-8"), re.M)
    }
    named = {
        name: page.name
        for page in pages.PAGES
        for name in re.findall(r"`(test_\w+)`", pages.text_of(page))
    }
    assert len(named) > 50
    assert {name: page for name, page in named.items() if name not in found} == {}


def test_the_table_of_sizes_is_that_of_the_code():
    documentation = sys.modules[hj.recipe.__module__].__doc__
    text = pages.text_of(pages.DOCS / "tutorials" / "own_model.md")
    lines = [line for line in documentation.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and [line for line in lines if line not in text] == []


def test_figures_in_prose_are_those_of_the_results():
    text = pages.text_of(pages.DOCS / "benchmarks.md")
    results = pages.ROOT / "benchmarks" / "results"
    found = json.loads((results / "rlaif_real_data.json").read_text(encoding="utf-8"))
    sft, ppo = (found["evaluation"]["models"][name] for name in ("sft", "ppo"))
    ended = [f"{100 * one['stopped']['value']:.0f} %" for one in (sft, ppo)]
    agreed = [f"{one['judge_accurate']['value']:.2f}" for one in (sft, ppo)]
    minutes = sum(found["minutes"].values()) + found["control_minutes_of_this_call"]
    assert f"({ended[0]} of responses to {ended[1]})" in text
    assert f"({agreed[0]} to {agreed[1]} of 5)" in text
    assert f"in {minutes:.0f} minutes on two cores" in text
    memory = (results / "convert_memory.txt").read_text(encoding="utf-8")
    checkpoint, there, back = (
        re.search(rf"{what} (\d\.\d\d) GiB", memory)[1]
        for what in ("checkpoint", "orbax: peak", "back: peak")
    )
    assert f"checkpoint of {checkpoint} GiB" in text and f"{there} and {back} GiB" in text
    _, there, back = re.split(r": peak (?=.*local disks)", memory)
    written = re.findall(r"(\d\.\d) MB written", memory)
    assert f"{there[:4]} and {back[:4]} GiB, within" in text and set(written) == {"0.1"}


def test_presets_that_are_named_are_there():
    text = pages.text_of(pages.DOCS / "models.md").partition("## ")[0]
    named = re.findall(r"`([a-z][a-z0-9._]*_[\d.]+[bm]\d?)`", text)
    assert len(named) > 20 and set(named) <= set(PRESETS)


def test_settings_that_are_named_are_fields():
    known = {
        ".".join(part for part in (path, *name) if part)
        for section in generated.load("reference_pages").sections()
        for path in section.paths
        for name in ((), *((field.name,) for field in dataclasses.fields(section.cls)))
    }
    tops = "|".join(name for name in known if name and "." not in name)
    setting = re.compile(
        rf"(?:--config\.|`)((?:{tops})(?:\.[a-z_0-9]+)+)(?=[`=])|--config\.([a-z_]+)="
    )
    for page in pages.PAGES:
        if (
            page.name == "paper_claims.md"
        ):  # Made of figures, with the names that they were made by.
            continue
        for found in setting.findall(pages.text_of(page)):
            name = found[0] or found[1]
            if not name.endswith((".json", ".jsonl", ".html", ".yml", ".py")):
                assert name in known, f"{page.name}: {name}"


def test_no_page_names_a_module_by_its_path():
    for page in pages.PAGES:
        prose = re.sub(r"^```\w*\n.*?^```", "", pages.text_of(page), flags=re.DOTALL | re.MULTILINE)
        for name in re.findall(r"huatuo_jax[./][\w./]*", prose):
            assert not re.search(r"/\w+\.py|huatuo_jax\.\w", name), f"{page.name}: {name}"


def test_no_page_names_a_place_of_a_machine():
    for page in pages.PAGES:
        assert not re.search(r"/(?:root|home|work|tmp|Users)/", pages.text_of(page)), page.name


def test_links_between_files_lead_somewhere(reference):
    made = {pages.DOCS / path for path in (*reference, "reference/map.md")}
    made |= {pages.DOCS / name for name in ("contributing.md", "changelog.md")}
    for page in pages.PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", pages.text_of(page)):
            path = (page.parent / target).resolve()
            assert path.exists() or path in made, f"{page.name}: {target}"


def test_every_row_format_is_listed_on_its_page():
    hooks = generated.load("site_hooks")
    text = pages.text_of(pages.DOCS / "formats.md")
    assert text.count("<!-- formats -->") == 1
    for one in ALL_FORMATS:
        assert one.name in hooks.formats()


def test_every_field_of_every_config_is_in_the_reference(reference):
    parts = re.split(r"^## ", "\n".join(reference.values()), flags=re.MULTILINE)

    def names(config):
        for field in dataclasses.fields(config):
            yield type(config), field.name
            value = getattr(config, field.name)
            for one in value if isinstance(value, tuple) else (value,):
                if is_config(one):
                    yield from names(one)

    for config in (hj.recipe("rlaif"), hj.recipe("dpo"), hj.recipe("ppo")):
        for section, field in names(config):
            imported = f"from {section.__module__} import {section.__name__}\n"
            (part,) = [one for one in parts if imported in one]
            assert f"\n`{field}` · " in part


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_flag_of_a_command_is_in_the_reference(reference, name, monkeypatch, capsys):
    parts = re.split(r"^## huatuo ", reference["reference/commands.md"], flags=re.MULTILINE)
    (part,) = [part for part in parts if part.startswith(f"{name} ")]
    monkeypatch.setattr(sys, "argv", ["huatuo", name, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with contextlib.suppress(SystemExit):
        cli.main()
    shown = re.findall(r"(?:^[^\w\[]*|│ )--([\w.]+)", capsys.readouterr().out, flags=re.MULTILINE)
    told = [flag.removesuffix(".FIELD") for flag in shown]
    assert len(told) > 1
    assert set(told) - {"help"} == set(re.findall(r"^`--([\w.]+)` · ", part, flags=re.MULTILINE))


def test_every_public_name_and_method_is_in_the_reference(reference):
    text = reference["reference/api.md"]
    for name in hj.__all__:
        assert f"{{#{name}}}" in text
    for owner in (hj.Model, hj.RewardModel, hj.Chat):
        for name, value in vars(owner).items():
            if name[0] != "_" and callable(value):
                assert f"{{#{owner.__name__}.{name}}}" in text


def test_a_field_without_documentation_is_refused():
    module = generated.load("reference_pages")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Halfway:
        """Two fields.

        Attributes:
            told: what it is.
        """

        told: int = 0
        untold: int = 0

    section = module.Section(Halfway, ("",), "recipe")
    with pytest.raises(ValueError, match="Halfway.untold has no line under Attributes:"):
        list(module._section(section, [section]))


def test_the_workflow_does_what_the_continuous_integration_does():
    text = (pages.ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in text and '["3.11", "3.12"]' in text
    assert "run: mkdocs build --strict" in text

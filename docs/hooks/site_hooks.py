"""Adds to the site what is generated: reference pages, the map, and files from outside `docs/`.

mkdocs loads this file (`hooks` in mkdocs.yml) and calls its `on_` functions.
"""

import os
import pathlib
import re
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Reading configs takes no accelerator.

import map_page
import reference_pages
from mkdocs.structure.files import File, Files

from huatuo_jax.data.readers import FORMATS

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OF_THE_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages, two pages of the repository's root, and the results' pictures."""
    pages = reference_pages.pages() | {"reference/map.md": map_page.page(ROOT)}
    for page, name in OF_THE_ROOT.items():
        pages[page] = _from_the_root((ROOT / name).read_text(encoding="utf-8"))
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for picture in sorted(RESULTS.glob("*.png")):
        place = f"images/results/{picture.name}"
        files.append(File.generated(config, place, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads pictures of the benchmarks, and files of the root, to their places on the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"]({up}../benchmarks/results/", f"]({up}images/results/")
    for place, name in OF_THE_ROOT.items():
        markdown = markdown.replace(f"]({up}../{name}", f"]({up}{place}")
    return markdown.replace("<!-- formats -->", formats())


def formats() -> str:
    """A table of all row formats that the readers know."""
    lines = ["| what | recognised by |", "|---|---|"]
    for family, formats in FORMATS.items():
        lines += [f"| {family}: {one.name} | {one.keys} |" for one in formats]
    return "\n".join(lines)


def _from_the_root(text: str) -> str:
    """A page of the repository's root with the links of a page of the site."""
    text = text.replace("](README.md)", "](index.md)")
    return re.sub(r"\]\(docs/", "](", text)

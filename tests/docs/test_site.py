"""The site: it is built without a warning, and reading it asks no other address for anything."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs import pages


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=pages.ROOT,
        env=os.environ | {"PYTHONPATH": str(pages.ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_on_the_site(site):
    for page in sorted(pages.DOCS.rglob("*.md")):
        place = page.relative_to(pages.DOCS).with_suffix("")
        folder = place.parent if place.name == "index" else place
        assert (site / folder / "index.html").is_file(), page
    for name in ("contributing", "changelog", "reference/map", "reference/api"):
        assert (site / name / "index.html").is_file()


def test_reading_the_site_asks_no_other_address(site):
    loaded = re.compile(
        r"<(?:script|img|iframe|source|video|audio)[^>]*\ssrc=[\"']?(?:https?:)?//"
        r"|<link(?![^>]*rel=[\"']?canonical)[^>]*\shref=[\"']?(?:https?:)?//"
    )
    for path in site.rglob("*.html"):
        assert not loaded.search(path.read_text(encoding="utf-8")), path
    for path in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", path.read_text("utf-8"))
        assert not found, path


def test_what_only_the_builder_needs_is_not_on_the_site(site):
    assert not list(site.rglob("*.py")) and not (site / "hooks").exists()

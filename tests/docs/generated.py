"""The modules that make the site's generated pages, which mkdocs loads by itself."""

import importlib
import sys

from tests.docs import pages

HOOKS = str(pages.DOCS / "hooks")


def load(name):
    """One of the modules in `docs/hooks`."""
    if HOOKS not in sys.path:
        sys.path.insert(0, HOOKS)
    return importlib.import_module(name)


def tables():
    """`benchmarks/tables.py`."""
    folder = str(pages.ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module("tables")

"""The README and the pages of the site: their text, shell commands and Python blocks."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PYTHON = ("python", "python3", ".venv/bin/python")
_SEPARATORS = {"&&", "||", ";", "&", "|"}


class Command(NamedTuple):
    """A command of a page.

    Attributes:
        page: its path below the repository.
        words: the command's, without assignments before it.
    """

    page: str
    words: tuple[str, ...]

    @property
    def script(self):
        """The file that Python runs; None where it runs none."""
        runs = self.words[0] in PYTHON and self.words[1].endswith(".py")
        return self.words[1] if runs else None

    def __str__(self):
        return shlex.join(self.words)


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, language):
    """The contents of a page's fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)


def commands():
    """All commands of all pages, each once on a page."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for words in commands_of(block):
                found[Command(str(page.relative_to(ROOT)), words)] = None
    return list(found)


def commands_of(block):
    """The words of each command in shell lines; loops give the commands inside of them."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        words = []
        for word in [*lexer, ";"]:
            if word not in _SEPARATORS:
                words.append(word)
                continue
            while words and (words[0] == "do" or re.match(r"[A-Z_]+=", words[0])):
                words.pop(0)
            if words and words[0] not in ("for", "done", "wait"):
                found.append(tuple(words))
            words = []
    return found

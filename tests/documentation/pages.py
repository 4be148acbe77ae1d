"""The pages as the tests read them: fenced blocks with their marks, and words set as code.

A mark is an HTML comment between blank lines before a fence, which no reader of the page sees:

    <!-- not run: REASON -->          commands are only parsed, by the parsers that would run them
    <!-- settings: scripts.pretrain -->   the command that a YAML block is a part of a preset for
    <!-- output -->                   what the commands of the page print, but for numbers and paths
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*(\S*)")
MARK = re.compile(r"^\s*<!-- (not run|settings|output)(?:: (.+))? -->\s*$")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, and the mark before it."""

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    words: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page.

    Raises:
        ValueError: a fence without an end, or a mark that stands before nothing.
    """
    blocks: list[Block] = []
    mark, words, marked = "", "", 0
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        found = MARK.match(line)
        if found is not None:
            mark, words, marked = found[1], found[2] or "", number
        fence = FENCE.match(line)
        if fence is not None:
            text = []
            for _, inner in lines:
                if inner.strip() == fence[2]:
                    break
                text.append(inner.removeprefix(fence[1]))
            else:
                raise ValueError(f"{name_of(page)}:{number}: this fence has no end")
            body = "\n".join(text) + "\n"
            blocks.append(Block(name_of(page), number, fence[3], body, mark, words))
            mark = ""
        elif mark and line.strip() and found is None:
            raise ValueError(f"{name_of(page)}:{marked}: this mark stands before no block")
    return blocks


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    kept, fence = [], ""
    for line in page.read_text(encoding="utf-8").splitlines():
        found = FENCE.match(line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif found is not None:
            fence = found[2]
        else:
            kept.append(line)
    return "\n".join(kept)


def inline_code(page: Path) -> list[str]:
    """What stands between backticks, also across the end of a line."""
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", prose(page))]


def command_lines(script: str) -> list[str]:
    """The commands of a block, continuation lines joined, without comments."""
    lines = script.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if shlex.split(line, comments=True)]

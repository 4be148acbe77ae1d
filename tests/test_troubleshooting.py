"""Messages that docs/troubleshooting.md explains are messages of the code, word for word."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
PACKAGES = (
    "classification", "contrastive", "data_pipelines", "encoders", "eval", "scripts", "training",
)  # fmt: skip
# Said by Python, torch, torchrun, and `make`.
FOREIGN = ("No module named 'scripts'", "CUDA out of memory", "ambiguous option")
SHORTEST = 8  # characters of a fragment that says something


def explained() -> list[str]:
    """The quoted messages of the tables' first columns."""
    messages = []
    for line in PAGE.splitlines():
        if line.startswith("| "):
            messages += re.findall(r"`([^`]+)`", line.split("|")[1])
    return [message for message in messages if len(message) > 12]  # not the names in symptoms


def template(node: ast.AST) -> str | None:
    """A text of the source, with `...` for what is put into it; None for other expressions."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = [template(value) for value in node.values]
        return "".join("..." if part is None else part for part in parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = template(node.left), template(node.right)
        return None if sides == (None, None) else "".join(side or "..." for side in sides)
    return None


@cache
def templates() -> list[str]:
    """All of the source that are no docstrings; backticks would end the quotation on the page."""
    found = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            prose = {node.value for node in nodes if isinstance(node, ast.Expr)}
            found += [text for node in nodes if node not in prose and (text := template(node))]
    return [text.replace("`", "'") for text in found]


def quotes(message: str, text: str) -> bool:
    """Whether the fragments between `...` of a message stand in a text, in this order."""
    end = 0
    for fragment in message.split("..."):
        place = text.find(fragment, end)
        if place < 0:
            return False
        end = place + len(fragment)
    return True


def test_the_page_explains_a_good_share_of_what_can_be_said() -> None:
    assert len(explained()) > 100
    assert len(explained()) == len(set(explained()))


@pytest.mark.parametrize("message", explained())
def test_an_explained_message_is_in_the_code(message: str) -> None:
    assert max(map(len, message.split("..."))) >= SHORTEST, "nothing to look for"
    assert message in FOREIGN or any(quotes(message, text) for text in templates())


def test_a_changed_message_would_be_found() -> None:
    assert quotes("no shard matches '...'", "no shard matches '...': the folder")
    assert not quotes("no shard fits '...'", "no shard matches '...'")
    assert not quotes("b ... a", "a ... b")

"""The API reference: every module is on one page, every docstring is understood, shown and true."""

from __future__ import annotations

import inspect
import logging
import re
from collections import Counter
from typing import Any

import griffe
import pytest

import encoders
from tests.conftest import ROOT

PACKAGES = ("classification", "contrastive", "data_pipelines", "encoders", "eval", "training")
# Not on a page, and why.
LEFT_OUT = {
    "eval.page_style": "a style sheet",
    "eval.report_style": "a style sheet",
}


def modules() -> list[str]:
    """Modules of all packages, by their dotted names, without the packages themselves."""
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return [name for name in names if not name.endswith(".__init__")]


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """The packages as the generator of the reference sees them."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], docstring_parser=griffe.Parser.google)
    return {name: loader.load(name) for name in PACKAGES}


def test_every_module_is_on_one_page_of_the_reference() -> None:
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    shown = [
        name
        for page in pages
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M)
    ]
    assert [name for name, count in Counter(shown).items() if count > 1] == []
    assert sorted(shown) == sorted(set(modules()) - LEFT_OUT.keys())
    assert LEFT_OUT.keys() <= set(modules())


def test_the_names_of_the_encoders_package_are_listed() -> None:
    text = (ROOT / "docs" / "reference" / "encoders.md").read_text(encoding="utf-8")
    table = text[text.index("| from") : text.index("## Soft MoE")]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(["encoders", *encoders.__all__])


def members(loaded: dict[str, Any]) -> list[Any]:
    """Public classes, functions and methods that are defined in our modules."""
    found = []
    for name in modules():
        module = loaded[name.partition(".")[0]]
        for part in name.split(".")[1:]:
            module = module.members[part]
        for member in module.members.values():
            if member.is_alias or member.name.startswith("_"):
                continue
            if member.is_function or member.is_class:
                found.append(member)
            if member.is_class:
                inner = member.members.values()
                found += [m for m in inner if not m.is_alias and m.is_function]
    return found


def test_docstrings_are_understood(
    loaded: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Arguments that are described exist; `make docs` only warns of the others."""
    caplog.set_level(logging.WARNING, logger="griffe")
    for member in members(loaded):
        if member.docstring is not None:
            assert member.docstring.parsed
    wrong = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert wrong == []


def test_public_functions_and_classes_are_described(loaded: dict[str, Any]) -> None:
    """What has no docstring is not shown; methods may be those of a base class that has one."""
    silent = [m.path for m in members(loaded) if m.docstring is None and m.parent.is_module]
    assert silent == []


def test_functions_that_refuse_say_so(loaded: dict[str, Any]) -> None:
    """A public function with a `raise` of its own has the error in its docstring."""
    silent = []
    for member in members(loaded):
        if member.is_function and member.parent.is_module and member.docstring is not None:
            body = inspect.cleandoc(member.source)
            text = member.docstring.value
            if re.search(r"^\s+raise \w+\(", body, re.M) and not re.search(
                r"[Rr]aise|Error|[Rr]efuse", text
            ):
                silent.append(member.path)
    assert silent == []

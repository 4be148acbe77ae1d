"""Prompts: big_vision's canonical form, aliases, and files that users write by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from eval.prompts import (
    canonicalize_text,
    class_prompts,
    read_class_prompts,
    read_classnames,
    read_templates,
)

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "text_canonicalisation.json").read_text("utf-8")
)


@pytest.mark.parametrize(
    ("field", "keep"), [("canonical", None), ("keep_comma", ","), ("keep_braces", "{}")]
)
def test_canonicalize_text_equals_big_vision(field: str, keep: str | None) -> None:
    cases = GOLDEN["canonicalize_text"]
    assert len(cases) == 30
    assert [canonicalize_text(c["input"], keep) for c in cases] == [c[field] for c in cases]


@pytest.mark.parametrize(
    ("text", "keep", "expected"),
    [
        ("a photo of a {}.", "{}", "a photo of a {}"),
        ("Granny-Smith apple", None, "grannysmith apple"),
        ("tench, Tinca_tinca", ",", "tench, tinca tinca"),
        ("jack-o'-lantern", None, "jackolantern"),
        ("T-shirt", None, "tshirt"),
    ],
)
def test_canonicalize_text_by_hand(text: str, keep: str | None, expected: str) -> None:
    assert canonicalize_text(text, keep) == expected


def test_class_names_equal_big_vision() -> None:
    names = GOLDEN["class_names"]
    whole = class_prompts(names["input"], ["{}"], canonicalize=True)
    first = class_prompts(names["input"], ["{}"], canonicalize=True, aliases="first")
    assert whole == [[name] for name in names["canonical"]]
    assert first == [[name] for name in names["first_alias"]]


def test_aliases() -> None:
    names, templates = ["Tench, Tinca_tinca", "cat"], ["a {}.", "{c}!"]
    assert class_prompts(names, templates) == [
        ["a Tench, Tinca_tinca.", "Tench, Tinca_tinca!"],
        ["a cat.", "cat!"],
    ]
    assert class_prompts(names, templates, aliases="first")[0] == ["a Tench.", "Tench!"]
    assert class_prompts(names, templates, aliases="all") == [
        ["a Tench.", "Tench!", "a Tinca_tinca.", "Tinca_tinca!"],
        ["a cat.", "cat!"],
    ]


def test_canonicalize_covers_names_and_templates() -> None:
    prompts = class_prompts(["Great-White Shark"], ["A photo of a {c}."], canonicalize=True)
    assert prompts == [["a photo of a greatwhite shark"]]


def test_braces_in_a_name_are_text() -> None:
    assert class_prompts(["set {}", "{c}"], ["the {}"]) == [["the set {}"], ["the {c}"]]


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{} and {c}", "{c} {c}", "{0}"])
def test_a_template_has_exactly_one_placeholder(template: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        class_prompts(["cat"], [template])
    path = tmp_path / "templates.txt"
    path.write_text(f"a {{}}\n{template}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"templates\.txt, line 2: \d placeholders"):
        read_templates(path)


@pytest.mark.parametrize("aliases", ["first", "all", "none"])
def test_a_class_without_a_name_is_named(aliases: Literal["first", "all", "none"]) -> None:
    name = " " if aliases == "none" else " , "
    with pytest.raises(ValueError, match=r"class 1 \("):
        class_prompts(["cat", name], ["{}"], aliases=aliases)


def test_punctuation_alone_leaves_no_name() -> None:
    assert class_prompts(["!!!"], ["{}"]) == [["!!!"]]
    with pytest.raises(ValueError, match=r"class 0 \('!!!'\)"):
        class_prompts(["!!!"], ["{}"], canonicalize=True)


def test_no_templates_and_unknown_alias_rule() -> None:
    with pytest.raises(ValueError, match="no prompt templates"):
        class_prompts(["cat"], [])
    unknown: Any = "last"
    with pytest.raises(ValueError, match="'last'"):
        class_prompts(["cat"], ["{}"], aliases=unknown)


def test_files_as_editors_write_them(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfa {c}.\r\n  the {}\x0c{ \r\ncaf\xc3\xa9 {}\r\n\r\n")
    assert read_templates(path) == ["a {}.", "the {}\x0c{", "café {}"]
    assert read_classnames(path) == ["a {c}.", "the {}\x0c{", "café {}"]


def test_an_empty_line_would_shift_labels(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("cat\n\ndog\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes\.txt', line 2 is empty"):
        read_classnames(path)
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"classes\.txt' is empty"):
        read_classnames(path)


def write_json(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_class_prompts_come_in_label_order(tmp_path: Path) -> None:
    path = write_json(tmp_path / "prompts.json", {"dog": ["A Dog_face."], "cat": ["a", "b", "a "]})
    assert read_class_prompts(path, ["cat", "dog"]) == [["a", "b", "a"], ["A Dog_face."]]
    assert read_class_prompts(path, ["cat", "dog", "cat"])[2] == ["a", "b", "a"]
    assert read_class_prompts(path, ["dog", "cat"], canonicalize=True)[0] == ["a dog face"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"cat": ["a"]}, r"no prompts for 'dog' and 1 more: add"),
        ({"cat": ["a"], "dog": ["b"], "owl": ["c"], "Cat": ["d"]}, r"for 'Cat', not among the 3"),
        ({"cat": ["a"], "dog": [], "owl": ["c"]}, "class 'dog' has no prompt"),
        ({"cat": ["a"], "dog": ["b", " "], "owl": ["c"]}, "class 'dog' has an empty prompt"),
        ({"cat": ["a"], "dog": "b", "owl": ["c"]}, "class 'dog': .* list of strings"),
        ({"cat": ["a"], "dog": [1], "owl": ["c"]}, "class 'dog': .* list of strings"),
        ('{"cat": ["a"], "dog": ["b"], "owl": ["c"], "dog": ["d"]}', r"'dog' twice\): it should"),
        ([["a"], ["b"], ["c"]], r"no JSON object: it should hold \{"),
        ("cat: a", r"cannot be read \(Expecting"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_unusable_class_prompts(content: Any, message: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "prompts.json", content)
    with pytest.raises(ValueError, match=message):
        read_class_prompts(path, ["cat", "dog", "owl"])


def test_unreadable_class_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file: it should hold"):
        read_class_prompts(tmp_path / "prompts.json", ["cat"])
    (tmp_path / "latin.json").write_bytes('{"café": ["a"]}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"cannot be read .*utf-8"):
        read_class_prompts(tmp_path / "latin.json", ["cat"])

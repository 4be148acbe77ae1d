"""Built-in class names and templates equal those that other packages ship, letter by letter.

None of these packages is imported: their files are read, if they are installed.
pip install --no-deps clip-benchmark tensorflow-datasets mmpretrain
"""

from __future__ import annotations

import ast
import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest

from eval.prompts import LABEL_SETS, builtin_labels, class_prompts, read_classnames, read_templates

SETS = json.loads(LABEL_SETS.read_text(encoding="utf-8"))["sets"]


def shipped(package: str, file: str) -> str:
    """Content of a file of an installed package."""
    try:
        path = distribution(package).locate_file(file)
    except PackageNotFoundError:
        pytest.skip(f"make peers installs {package}, whose own requirements do not fit")
    return Path(str(path)).read_text(encoding="utf-8")


def constants(source: str) -> dict[str, Any]:
    """Literal lists of a Python file, by name."""
    return {
        node.targets[0].id: list(ast.literal_eval(node.value))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.List | ast.Tuple)
        and all(isinstance(item, ast.Constant) for item in node.value.elts)
    }


def spaced(names: list[str]) -> list[str]:
    return [name.replace("_", " ").replace("/", " ") for name in names]


def test_every_set_makes_prompts() -> None:
    sizes = {"cifar100": 100, "food101": 101, "cars": 196, "fgvc_aircraft": 100, "sun397": 397}
    assert {name: len(builtin_labels(name)["classes"]) for name in sizes} == sizes
    for name in SETS:
        names, templates = read_classnames(f"builtin:{name}"), read_templates(f"builtin:{name}")
        assert len(set(names)) == len(names)
        assert len(class_prompts(names, templates)) == len(names)


def test_names_and_templates_are_clip_benchmarks() -> None:
    folder = "clip_benchmark/datasets"
    names = json.loads(shipped("clip-benchmark", f"{folder}/en_classnames.json"))
    templates = json.loads(
        shipped("clip-benchmark", f"{folder}/en_zeroshot_classification_templates.json")
    )
    compared = SETS.keys() & names.keys()
    assert len(compared) >= 15
    for name in compared:
        assert SETS[name]["classes"] == names[name], name
    compared = SETS.keys() & templates.keys()
    assert len(compared) >= 22
    for name in compared:
        expected = [template.replace("{c}", "{}") for template in templates[name]]
        assert SETS[name]["templates"] == expected, name


def test_names_are_those_of_mmpretrain() -> None:
    found = constants(shipped("mmpretrain", "mmpretrain/datasets/categories.py"))
    names = {
        "cifar10": "CIFAR10", "cifar100": "CIFAR100", "dtd": "DTD", "sun397": "SUN397",
    }  # fmt: skip
    for own, other in names.items():
        assert SETS[own]["classes"] == spaced(found[f"{other}_CATEGORIES"]), own
    # "F-16A/B" and "C/V Cargo Van" keep their strokes.
    assert SETS["cars"]["classes"] == found["STANFORDCARS_CATEGORIES"]
    assert SETS["fgvc_aircraft"]["classes"] == found["FGVCAIRCRAFT_CATEGORIES"]
    # Its order is that of torchvision, which sorts by the names with underscores.
    food = sorted(found["FOOD101_CATEGORIES"], key=lambda name: name.replace(" ", "_"))
    assert SETS["food101"]["classes"] == spaced(food)


def test_names_are_those_of_tensorflow_datasets() -> None:
    folder = "tensorflow_datasets/image_classification"
    cars = constants(shipped("tensorflow-datasets", f"{folder}/cars196.py"))["_NAMES"]
    assert SETS["cars"]["classes"] == cars
    sun = shipped("tensorflow-datasets", f"{folder}/sun397_labels.txt").split()
    assert SETS["sun397"]["classes"] == spaced([name[3:] for name in sun])
    builder = "tensorflow_datasets/datasets/resisc45/resisc45_dataset_builder.py"
    lists = constants(shipped("tensorflow-datasets", builder)).values()
    assert SETS["resisc45"]["classes"] in [spaced(names) for names in lists]
    food = shipped("tensorflow-datasets", f"{folder}/food-101_classes.txt").split()
    assert SETS["food101"]["classes"] == spaced(sorted(food))
    textures = shipped("tensorflow-datasets", f"{folder}/dtd_key_attributes.txt").splitlines()
    assert set(SETS["dtd"]["classes"]) == {line.split()[0] for line in textures if line.strip()}

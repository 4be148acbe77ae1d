"""What the pages name is there: settings, options, files, functions, links, open_clip's flags."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from open_clip_train import params

from data_pipelines import tool_config
from data_pipelines.config import AugmentationConfig
from encoders.routers import ROUTERS, router_options
from eval.config import EvaluationSetConfig
from scripts import app, cache_embeddings, evaluate, export, inspect_model, upcycle
from scripts.pretrain import PretrainRun
from scripts.train_contrastive import ContrastiveRun
from tests.conftest import ROOT
from tests.documentation.commands import Parsed, check, stop_after
from tests.documentation.pages import PAGES, inline_code, name_of, prose
from training.config import ParameterRule

RUNS = (PretrainRun(), ContrastiveRun(), evaluate.EvaluateRun())
COMMANDS = (
    *RUNS, app.App(), cache_embeddings.CacheRun(), export.Export(), inspect_model.Inspection(),
    upcycle.Upcycling(), tool_config.PackConfig(), tool_config.ValidateConfig(),
    tool_config.StatsConfig(), tool_config.ShowConfig(), tool_config.IndexConfig(),
)  # fmt: skip
# Entries of lists, which have no default to look at.
ENTRIES = {"evaluation": EvaluationSetConfig(), "optimizer.rules": ParameterRule()}
GROUPS = "classification contrastive data evaluation image model optimizer schedule text train"
SETTING = re.compile(rf"^(?:--)?((?:{'|'.join(GROUPS.split())})(?:\.[a-z]\w*)+)(?![\w.]*[(/])")
FILES = (
    ".json",
    ".jsonl",
    ".onnx",
    ".safetensors",
    ".tar",
    ".yaml",
    ".png",
    ".txt",
    ".html",
    ".log",
)
# Options of other programs, and of commands that take no dataclass.
FOREIGN = {
    "--help", "--config", "--resume", "--nnodes", "--nproc_per_node", "--rdzv_id", "--max_restarts",
    "--multi_gpu", "--use_fsdp", "--fsdp_version", "--num_processes", "--cpu", "--machine_rank",
    "--output", "--only", "--full", "--rounds", "--device", "--dtype", "--seed", "--signal",
    "--benchmark", "--no-deps", "--data", "--steps", "--seeds",
}  # fmt: skip
PACKAGES = "classification contrastive data_pipelines encoders eval training scripts benchmarks"
MODULE = re.compile(rf"^((?:{'|'.join(PACKAGES.split())})(?:\.[A-Za-z]\w*)+)(?:\(.*\))?$")
PLACE = re.compile(rf"^((?:{'|'.join(PACKAGES.split())}|configs|docs|tests)/[\w./-]*)$")
# Values that stand in the place of names.
VALUES = {
    "few_shot", "zero_shot_classification", "linear_probe", "importance", "load", "act_layer",
    "soft_moe", "amp_bf16", "amp_bfloat16", "pure_bf16", "pure_fp16", "open_clip_train",
}  # fmt: skip


def settings_of(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        yield name
        inner = value if dataclasses.is_dataclass(value) else ENTRIES.get(name)
        if inner is not None:
            yield from settings_of(inner, f"{name}.")


SETTINGS = {name for run in RUNS for name in settings_of(run)}
OPTIONS = {name for command in COMMANDS for name in settings_of(command)}
LEAVES = {name.rpartition(".")[2] for name in OPTIONS | set(settings_of(AugmentationConfig()))}


def our_words(page: Path) -> list[str]:
    """Inline code; in tables that translate, only the columns that are about this project."""
    if not page.name.startswith("migrating"):
        return inline_code(page)
    kept, columns = [], None
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            columns = None
            kept.append(line)
            continue
        cells = line.strip("|").split("|")
        if columns is None:
            columns = [n for n, cell in enumerate(cells) if cell.strip() in ("here", "note")]
        kept += [cells[number] for number in columns]
    return [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", "\n".join(kept))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_are_named_exist(page: Path) -> None:
    wrong = []
    for words in our_words(page):
        found = SETTING.match(words)
        if found is None or found[1].endswith((*FILES, "_")) or found[1] in SETTINGS:
            continue
        if re.match(r"(image|model)\.arguments\.?", found[1]) or MODULE.match(words):
            continue
        wrong.append(words)
    assert not wrong, wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_that_are_named_exist(page: Path) -> None:
    named = {
        option
        for words in our_words(page)
        for option in re.findall(r"(?<![\w-])--[A-Za-z][\w.-]*", words)
    }
    ours = {f"--{name}" for name in OPTIONS}
    theirs = {flag for flag in open_clip_flags() if "-" in flag[2:] or "open_clip" in page.name}
    assert named <= ours | theirs | FOREIGN, named - ours - theirs - FOREIGN


def test_arguments_of_models_in_the_translations_exist() -> None:
    """`name: value` in the columns of this project: settings, arguments, options of routers."""
    import timm.models.vision_transformer as timm_vit

    from encoders.vision_transformer import SoftMoEVisionTransformer

    known = LEAVES | set().union(*(router_options(router) for router in ROUTERS))
    for model in (SoftMoEVisionTransformer, timm_vit.VisionTransformer):
        known |= set(model.__init__.__annotations__)
    known |= VALUES
    for page in PAGES:
        if page.name.startswith("migrating"):
            for words in our_words(page):
                names = re.findall(r"(?:^|\{|, )([a-z_]+): ", words)
                names += re.findall(r"^[a-z]+_[a-z_]+$", words)
                assert set(names) <= known, words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_modules_and_functions_that_are_named_exist(page: Path) -> None:
    for words in inline_code(page):
        place, module = PLACE.match(words), MODULE.match(words)
        if place is not None:
            assert (ROOT / place[1]).exists(), place[1]
        elif module is not None and module[1] not in SETTINGS and not module[1].endswith(FILES):
            resolve(module[1])


def resolve(dotted: str) -> object:
    """A module, or what is in one, by its dotted name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"there is no {dotted}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_pages_and_to_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(there), re.M)
            assert anchor in {slug(heading) for heading in headings}, target


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def test_every_page_is_in_the_navigation_and_the_home_page_leads_to_it() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w/]+\.md", yaml.safe_dump(nav))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.parent != ROOT}
    assert sorted(listed) == sorted(pages)
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w/]+\.md)\)", home)) == pages - {"index.md"}


def open_clip_flags() -> set[str]:
    """The options of its training command, from its own parser."""
    with pytest.MonkeyPatch.context() as patch:
        parsers: list[argparse.ArgumentParser] = []

        def remember(parser: argparse.ArgumentParser, *_: object) -> None:
            parsers.append(parser)

        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(remember))
        with pytest.raises(Parsed):
            params.parse_args([])
    return {name for name in parsers[0]._option_string_actions if name.startswith("--")}


def test_every_flag_of_open_clip_is_translated_once() -> None:
    text = (ROOT / "docs" / "migrating_from_open_clip.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| `--", line)]
    flags = [flag for row in rows for flag in re.findall(r"`(--[\w-]+)`", row[1])]
    assert sorted(flags) == sorted(open_clip_flags() - {"--help"})
    for row in rows:  # a setting, or the reason why there is none
        assert row[2].strip() or row[3].strip(), row


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_would_be_accepted(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for words in our_words(page):
        command = re.sub(r"\[[^\]]*\]|\.\.\.", "", words)  # `RUN [RUN ...]`, `python -m x ...`
        if not re.match(r"(python|accelerate launch|torchrun|make|pip install) ", command):
            continue
        command = command.replace("--config FILE", "--config configs/lit.yaml")
        filled = shlex.split(command.replace(" TOOL --help", " pack"))
        if filled[:2] == ["python", "-m"] and len(filled) == 3:  # only named
            resolve(filled[2])
        elif filled[0] == "accelerate" and "-m" not in filled:
            check([*filled, "-m", "scripts.train_contrastive"])
        else:
            check(filled)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_rows_of_tables_have_as_many_cells_as_their_heads(page: Path) -> None:
    """A bar inside of code ends a cell, too."""
    width = None
    for line in prose(page).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.split(r"(?<!\\)\|", line))
        width = width or cells
        assert cells == width, line


def test_pages_that_code_and_presets_send_people_to_exist() -> None:
    folders = [ROOT / name for name in (*PACKAGES.split(), "configs", "tests")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    named = set()
    for path in files:
        if path.suffix in (".py", ".yaml"):
            named |= set(re.findall(r"docs/\w[\w/]*\.md", path.read_text(encoding="utf-8")))
    assert named
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []

"""Every fenced block of README and docs/ runs, or says in an invisible mark why only its words are
checked (tests/documentation/pages.py)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from classification.objective import ClassificationObjective, build_classifier
from contrastive.dual_encoder import build_dual_encoder, model_config
from encoders.flops import image_flops
from scripts.cli import parse_config
from scripts.evaluate import EvaluateRun
from scripts.pretrain import PretrainRun
from scripts.train_contrastive import ContrastiveRun
from tests.conftest import ROOT
from tests.documentation.commands import check, commands_of, run_command
from tests.documentation.pages import PAGES, Block, command_lines, name_of, read_blocks
from tests.documentation.prepared import World
from training.optim import match_rules

TASKS: dict[str, Any] = {
    "scripts.evaluate": EvaluateRun,
    "scripts.pretrain": PretrainRun,
    "scripts.train_contrastive": ContrastiveRun,
}
# Tests of their own run all blocks of these pages, of these languages.
ELSEWHERE = {
    "README.md": ("tests/test_readme.py", {"bash", "python"}),
    "docs/export.md": ("tests/export/test_export_page.py", {"bash", "python"}),
    "docs/shards.md": ("tests/test_docs_shards.py", {"bash"}),
}
# What the commands of a page find, and what the page's words stand for at this size.
FOUND = {
    "docs/cached_embeddings.md": {"runs/pretrain": "encoder"},
    "docs/evaluation.md": {"runs/pairs": "pairs", "runs/pretrain": "encoder", "data/mine": "set"},
    "docs/towers.md": {"runs/pretrain": "experts", "models/bert": "bert"},
    "docs/training.md": dict.fromkeys(("runs/long", "runs/one", "runs/two"), "encoder"),
}
REPLACED = {
    "step_00050000": "step_00000002", "step_00100000": "step_00000002",
    '"num_experts": 32': '"num_experts": 4',
}  # fmt: skip
# What the commands of a page leave, all of it with something in it.
LEFT = {
    "docs/cached_embeddings.md": ["data/pairs_embedded"],
    "docs/evaluation.md": ["runs/results/pairs/report.html", "comparison.md"],
    "docs/quick_start.md": ["runs/quick/slots.png"],
    "docs/training.md": ["curves.png"],
}
PRINTED = {"docs/quick_start.md": ["acc1", "routing of"], "docs/evaluation.md": ["10shot_acc1"]}
# Their models have hundreds of millions of parameters: they are built without memory for them.
WITHOUT_MEMORY = {"docs/experts_and_slots.md", "docs/routers.md"}
BLOCKS = [block for page in PAGES for block in read_blocks(page)]
OURS = [block for block in BLOCKS if block.page not in ELSEWHERE]


def of(kind: str, language: str = "") -> list[Block]:
    """Blocks with a mark (or `run`, without one), of a language."""
    marked = [block for block in OURS if (block.mark or "run") == kind]
    return [block for block in marked if not language or block.language == language]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[World]:
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield World(tmp_path_factory.mktemp("world"), shards)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_nothing_is_passed_over(block: Block) -> None:
    """Each block is of a kind that one of the tests below, or that of the page, takes up."""
    if block.page in ELSEWHERE:
        test, languages = ELSEWHERE[block.page]
        assert Path(block.page).name in (ROOT / test).read_text(encoding="utf-8")
        assert block.language in languages
        assert not block.mark
        return
    kinds = {
        ("bash", ""), ("python", ""), ("bash", "not run"), ("yaml", "settings"), ("text", "output"),
    }  # fmt: skip
    assert (block.language, block.mark) in kinds
    assert block.words or block.mark not in ("not run", "settings")  # a reason, a command
    if block.mark == "output":  # of something that is run
        assert any(other.page == block.page for other in of("run", "bash"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_made_by_indenting(page: Path) -> None:
    """Those would be passed over."""
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"^(?:    )+(?:python|accelerate|torchrun|make|pip) .*", text, re.M)


@pytest.mark.parametrize("page", sorted({block.page for block in of("run")}))
def test_blocks_run_in_the_order_of_the_page(
    page: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for place, what in FOUND.get(page, {}).items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(world.get(what))
    names: dict[str, object] = {}
    for block in OURS:
        if block.page != page:
            continue
        text = block.text
        for large, small in REPLACED.items():
            text = text.replace(large, small)
        if block.language == "python":
            with torch.device("meta" if page in WITHOUT_MEMORY else "cpu"):
                exec(compile(text, str(block), "exec"), names)
        elif block.language == "bash" and not block.mark:
            for line in command_lines(text):
                run_command(shlex.split(line, comments=True), world.small)
    for left in LEFT.get(page, []):
        path = tmp_path / left
        assert any(path.iterdir()) if path.is_dir() else path.stat().st_size > 100, left
    printed = capsys.readouterr().out
    for words in PRINTED.get(page, []):
        assert words in printed
    for block in of("output"):
        if block.page == page:
            compare_output(block, printed)


def compare_output(block: Block, printed: str) -> None:
    """Lines of the block are printed, with other numbers, other paths, and something for `...`."""
    for line in block.text.splitlines():
        pattern = re.escape(line).replace(r"\.\.\.", ".*")
        pattern = re.sub(r"\d+", r"\\d+", re.sub(r"from \S+", r"from \\S+", pattern))
        assert re.search(f"^{pattern}$", printed, re.M), f"{line}\nis not in\n{printed}"


@pytest.mark.parametrize("block", of("not run", "bash"), ids=str)
def test_commands_that_do_not_run_here_would_be_accepted(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    commands = commands_of(block.text, tmp_path)
    assert commands
    for words in commands:
        check(words)


@pytest.mark.parametrize("page", sorted(ELSEWHERE))
def test_commands_of_pages_with_tests_of_their_own(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the page's test leaves out, too: make, pip, the server."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in BLOCKS:
        if block.page == page and block.language == "bash":
            for line in command_lines(block.text):
                words = shlex.split(line, comments=True)
                if words[0] not in ("mkdir", "tar"):
                    check(words)


class UniqueKeys(yaml.SafeLoader):
    """A key that is given twice would hide the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"given twice: {keys}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("block", of("settings"), ids=str)
def test_settings_are_those_of_the_command_and_build_its_model(
    block: Block, tmp_path: Path
) -> None:
    for number, document in enumerate(yaml.load_all(block.text, UniqueKeys)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(document), encoding="utf-8")
        config: Any = parse_config(TASKS[block.words], [f"--config={path}"], "")
        with torch.device("meta"):
            if block.words == "scripts.train_contrastive":
                towers = config.image, config.text, config.contrastive
                build_dual_encoder(model_config(*towers, config.train.batch_size))
            else:
                model = build_classifier(config.model, 10)
                objective = ClassificationObjective(model, config.model, 10)
                names = [name for name, _ in objective.named_parameters()]
                if config.optimizer.rules:  # an error where one fits nothing
                    assert match_rules(names, config.optimizer.rules, objective)


def rows_of(page: str, first: str) -> list[list[str]]:
    """Rows of a table whose first cell matches a pattern; cells without spaces and stars."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("*") for cell in row] for row in rows]
    return [row for row in cells if re.fullmatch(first, row[0])]


def meta_model(name: str, **options: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def amount(cell: str) -> float:
    """A number with its unit."""
    number, _, unit = cell.partition(" ")
    return float(number) * {"M": 1e6, "G": 1e9, "B": 1e9, "GB": 1e9, "": 1.0}[unit]


def parameters(model: Any, part: str = "") -> int:
    return sum(p.numel() for name, p in model.named_parameters() if part in name)


def test_the_table_of_costs_is_right() -> None:
    rows = rows_of("experts_and_slots.md", r"dense|\d+( experts)? x \d+.*")
    assert len(rows) == 7
    for first, slots, *figures in rows:
        experts, each = map(int, re.findall(r"\d+", first)[:2]) if slots else (0, 0)
        options = {"num_experts": experts, "slots_per_expert": each} if experts else {}
        assert (str(experts * each) if experts else "") == slots
        for place, size in enumerate(("small", "base")):
            kind = "soft_moe" if experts else "dense"
            model = meta_model(f"{kind}_vit_{size}_patch16_224", num_classes=0, **options)
            counted, flops = figures[2 * place : 2 * place + 2]
            assert parameters(model) == pytest.approx(amount(counted), rel=0.03), first
            assert sum(image_flops(model).values()) / 1e9 == pytest.approx(float(flops), abs=0.06)


def test_the_table_of_memory_is_right() -> None:
    rows = rows_of("scaling.md", r"ViT B/16|Soft MoE ./1\d, 128 experts")
    names = [
        "dense_vit_base_patch16_224", "soft_moe_vit_small_patch16_224",
        "soft_moe_vit_base_patch16_224", "soft_moe_vit_large_patch16_224",
        "soft_moe_vit_huge_patch14_224",
    ]  # fmt: skip
    for name, (_, counted, whole, divided, sharded) in zip(names, rows, strict=True):
        model = meta_model(name, **({} if "dense" in name else {"num_experts": 128}))
        total, experts = parameters(model), parameters(model, ".experts.")
        assert total == pytest.approx(amount(counted), rel=0.01)
        assert 16 * total == pytest.approx(amount(whole), rel=0.02)
        if experts:
            kept = total - experts + experts / 8
            assert 16 * kept == pytest.approx(amount(divided), rel=0.02)
        assert 16 * total / 8 == pytest.approx(amount(sharded), rel=0.02, abs=6e7)

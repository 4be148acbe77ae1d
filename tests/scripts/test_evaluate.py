"""The evaluation command: what it leaves out, what it refuses, and two processes like one."""

from __future__ import annotations

import json
import socket
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from scripts import evaluate

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with an untrained dual encoder, as the training commands leave it."""
    torch.manual_seed(0)
    config = ContrastiveConfig(embed_dim=8)
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    description = model_config(ImageTowerConfig(TEST), text, config)
    model = build_dual_encoder(description)
    objective = ContrastiveObjective(model, description, config, HALF, HALF)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file(model.state_dict(), folder / objective.weights_file)
    for name, content in objective.config_files().items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


def own_set(shards: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "own", "shards": f"{shards}/train-*.tar", "caption_key": "txt", "batch_size": 5,
        "classnames": f"{shards}/classnames.txt",
    } | changes  # fmt: skip


def arguments(model: Path, *sets: dict[str, Any], output: Path | None = None) -> list[str]:
    options = [f"--model={model}", f"--evaluation={json.dumps(sets)}", "--threads=1"]
    return [*options, *([] if output is None else [f"--output={output}"])]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(*options: str) -> list[str]:
    module = ["-m", "accelerate.commands.launch", "--num_processes=2"]
    return [*module, f"--main_process_port={free_port()}", *options]


def test_what_is_left_out_is_told(
    on_the_cpu: None,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    broken = (shards / "train-0.tar").read_bytes().replace(b"\x89PNG", b"\x00PNG", 2)
    (tmp_path / "train-0.tar").write_bytes(broken)
    (tmp_path / "train-1.tar").write_bytes((shards / "train-1.tar").read_bytes()[:-12_000])
    own = own_set(shards) | {"shards": f"{tmp_path}/train-*.tar"}
    output = tmp_path / "records.json"
    evaluate.main(arguments(checkpoint, own, output=output))
    lines = capsys.readouterr().out.splitlines()
    assert "own: 2 samples skipped: 2 broken image" in lines
    assert f"warning: '{tmp_path}/train-1.tar' ends early; its complete samples are used" in lines
    records = json.loads(output.read_text())
    assert [record["n_skipped"] for record in records] == [2, 2]
    assert records[0]["preprocess"]["interpolation"] == "bicubic"


def refusal(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_wrong_classnames_file_is_an_error(
    on_the_cpu: None,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "few.txt").write_text("red\ngreen\nblue\n")
    own = own_set(shards, classnames=str(tmp_path / "few.txt"))
    line = refusal(capsys, arguments(checkpoint, own))
    assert "has label 3, but there are 3 classes: wrong classnames file or label_key?" in line


def test_class_prompts_take_the_place_of_templates(
    on_the_cpu: None,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    templates = ["a {} square", "{}"]
    names = (shards / "classnames.txt").read_text().split()
    same = {name: [text.replace("{}", name) for text in templates] for name in reversed(names)}
    prompts, output = tmp_path / "prompts.json", tmp_path / "records.json"
    prompts.write_text(json.dumps(same))
    sets = [
        own_set(shards, templates=templates, caption_key=None),
        own_set(shards, class_prompts=str(prompts), caption_key=None),
    ]
    evaluate.main(arguments(checkpoint, *sets, output=output))
    by_template, by_prompt = json.loads(output.read_text())
    assert by_prompt["metrics"] == by_template["metrics"]
    assert by_prompt["class_prompts_sha256"] == sha256(prompts.read_bytes()).hexdigest()
    assert "templates" not in by_prompt
    sets[1]["templates"] = templates
    assert "both templates and class_prompts: set one" in refusal(
        capsys, arguments(checkpoint, sets[1])
    )
    own = own_set(shards, class_prompts=str(prompts), classnames="")
    assert "needs classnames" in refusal(capsys, arguments(checkpoint, own))


def test_the_models_own_resize_counts_where_no_set_chooses(
    on_the_cpu: None,
    capsys: pytest.CaptureFixture[str],
    checkpoint: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    path = checkpoint / "open_clip_config.json"
    description = json.loads(path.read_text())
    description["preprocess_cfg"] |= {"resize_mode": "pad", "interpolation": "bilinear"}
    path.write_text(json.dumps(description))
    chosen = own_set(shards, resize_mode="shortest")
    line = refusal(capsys, arguments(checkpoint, chosen, own_set(shards)))
    assert "resize_mode 'pad' is not supported: choose " in line
    output = tmp_path / "records.json"
    evaluate.main(arguments(checkpoint, chosen, output=output))
    for record in json.loads(output.read_text()):
        assert record["preprocess"]["resize_mode"] == "shortest"
        assert record["preprocess"]["interpolation"] == "bilinear"


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(
    checkpoint: Path, shards: Path, tmp_path: Path, run_python: Any
) -> None:
    own = own_set(shards)
    found: list[list[dict[str, Any]]] = []
    for number, start in enumerate(([], launch())):  # without --cpu: there is no accelerator
        output = tmp_path / f"{number}.json"
        words = arguments(checkpoint, own, output=output)
        result = run_python(*start, "-m", "scripts.evaluate", *words)
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("starting 2 CPU processes" in result.stderr) == bool(start)
        assert result.stdout.count("own ") == 15  # the table, once
        found.append(json.loads(output.read_text()))
    one, two = found
    assert len(one) == 2
    assert two == one


@pytest.mark.slow
def test_two_processes_pretrain_like_one(shards: Path, tmp_path: Path, run_python: Any) -> None:
    losses = []
    for start in ([], launch("--cpu")):
        run_dir = tmp_path / f"run{len(losses)}"
        result = run_python(
            *start, "-m", "scripts.pretrain", f"--run_dir={run_dir}", f"--model.name={TEST}",
            f"--data.shards={shards}/train-*.tar", f"--data.classnames={shards}/classnames.txt",
            "--train.steps=4", "--train.batch_size=8", "--train.threads=1", "--data.workers=0",
            "--train.log_every=1", "--optimizer.lr=0.001",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        assert ("2 process(es) on cpu" in result.stdout) == bool(start)
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    one, two = losses
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-4)
    assert len(set(one)) == 4

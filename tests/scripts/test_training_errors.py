"""What the training commands refuse: one line, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import pretrain, train_contrastive

TEST = "soft_moe_vit_test_patch16_64"


def contrastive_arguments(shards: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"--run_dir={run_dir}", f"--image.name={TEST}", f"--data.shards={shards}/train-*.tar",
        "--text.width=16", "--text.heads=2", "--text.layers=1", "--text.context_length=8",
        "--contrastive.embed_dim=8", "--train.steps=2", "--train.batch_size=8",
        "--train.threads=1", "--data.workers=0", *more,
    ]  # fmt: skip


def pretrain_arguments(shards: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"--run_dir={run_dir}", f"--model.name={TEST}", f"--data.shards={shards}/train-*.tar",
        f"--data.classnames={shards}/classnames.txt", "--train.steps=2", "--train.batch_size=8",
        "--train.threads=1", "--data.workers=0", *more,
    ]  # fmt: skip


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a contrastive run of two steps."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train_contrastive.main(contrastive_arguments(shards, run_dir))
    return run_dir


def refusal(capsys: pytest.CaptureFixture[str], command: Any, arguments: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


CONTRASTIVE_ERRORS = {
    "no shards": (["--data.shards="], "set data.shards, for example"),
    "missing shards": (["--data.shards={shards}/none-{0..3}.tar"], "not '"),
    "missing folder": (["--data.shards={shards}/no/*.tar"], "does not exist"),
    "no tar": (["--data.shards={shards}/classnames.txt"], "is not a tar file"),
    "no such member": (["--data.caption_key=text"], "looked for text; the shards hold: cls, png"),
    "no such picture": (["--data.image_keys=[gif]"], "has a member for the picture"),
    "large batch": (["--train.batch_size=25"], "larger than the data set of 24 samples"),
    "unknown tower": (["--image.name=soft_moe_vit_huge"], "'soft_moe_vit_huge' is unknown"),
    "text heads": (["--text.heads=3"], "width 16 is not divisible by 3 heads"),
    "missing text folder": (["--text.kind=hugging_face", "--text.folder=none"], "none"),
    "accumulation": (
        ["--train.accumulation=2", "--image.name=test_resnet"],
        "train.accumulation must be 1, got 2",
    ),
    "trainable noise": (["--image.trainable=1"], "image.trainable would keep random weights"),
    "no steps": (["--train.steps=0"], "train.steps must be at least 1"),
    "schedule": (["--schedule.warmup_steps=3"], "need 3 steps, but train.steps is 2"),
    "threads": (["--train.threads=0"], "train.threads must be at least 1"),
    "workers": (["--data.workers=-1"], "data.workers must not be negative"),
    "scale": (["--contrastive.logit_scale=0"], "must be positive"),
    "no weights": (["--image.init_from={shards}/nothing"], "does not exist"),
    "frozen noise": (["--image.frozen=true"], "image.frozen would keep random weights"),
    "frozen noise text": (["--text.frozen=true"], "text.frozen would keep random weights"),
    "frozen without weights": (["--text.trainable=1"], "set text.init_from to an open_clip"),
    "nothing to allow": (["--text.init_allow=[x]"], "text.init_allow allows differences to"),
    "no text weights": (["--text.init_from=none"], "text.init_from 'none' does not exist"),
    "folder of another kind": (["--text.folder=x"], "set text.kind to hugging_face"),
    "pooling of another kind": (["--text.pooling=cls"], "set text.kind to hugging_face"),
    "activation of another kind": (
        ["--text.kind=hugging_face", "--text.quick_gelu=true"],
        "text.quick_gelu needs text.kind open_clip",
    ),
    "blocks of another kind": (
        ["--text.kind=bag_of_words", "--text.moe_blocks=1"],
        "text.moe_blocks needs text.kind open_clip",
    ),
    "classes of an encoder": (
        ['--image.arguments={"num_classes": 3}'],
        "image.arguments must not set num_classes",
    ),
    "weights as an argument": (
        ['--image.arguments={"checkpoint_path": "x"}'],
        "must not set checkpoint_path",
    ),
    "unknown argument": (
        ['--image.arguments={"rooter": "soft"}'],
        f"image.arguments do not suit {TEST}",
    ),
    "odd image size": (['--image.arguments={"img_size": [64, 32]}'], "must be a number of pixels"),
    "no such checkpoint": (["--resume={shards}"], "is no complete checkpoint"),
    "evaluation of nothing": (
        ['--evaluation=[{"shards": "{shards}/train-0.tar"}]'],
        "measures nothing: set classnames",
    ),
    "evaluation without shards": (
        ['--evaluation=[{"shards": "{shards}/none.tar", "caption_key": "txt"}]'],
        "no shard matches",
    ),
}


@pytest.mark.parametrize("name", CONTRASTIVE_ERRORS)
def test_contrastive_training_refuses(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path, name: str
) -> None:
    changes, message = CONTRASTIVE_ERRORS[name]
    options = [change.replace("{shards}", str(shards)) for change in changes]
    run_dir = tmp_path / "runs" / "one"
    arguments = contrastive_arguments(shards, run_dir, *options)
    assert message in refusal(capsys, train_contrastive, arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.label_key=json:label"], "member for the label: looked for json"),
        (["--data.classnames={shards}/none.txt"], "should hold one name per line"),
        (["--model.mixup=0.2", "--train.batch_size=7"], "must be even"),
        (["--model.label_smoothing=1"], "label_smoothing must be in [0, 1)"),
        (["--train.accumulation=3"], "8 cannot be divided into 1 processes x 3 parts"),
        (["--train.precision=fp16"], "fp16 needs a GPU"),
    ],
)
def test_pretraining_refuses(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    shards: Path,
    tmp_path: Path,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = [option.replace("{shards}", str(shards)) for option in options]
    arguments = pretrain_arguments(shards, tmp_path / "run", *options)
    assert message in refusal(capsys, pretrain, arguments)
    assert list(tmp_path.iterdir()) == []


def test_empty_shards(
    capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("empty")
    (folder / "train-0.tar").touch()
    arguments = contrastive_arguments(folder, tmp_path / "run")
    line = refusal(capsys, train_contrastive, arguments)
    assert "no sample in" in line
    assert f"'{folder}/train-0.tar'" in line
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_unusable_samples_stops_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, shards: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for shard in shards.glob("*.tar"):
        content = shard.read_bytes().replace(b"\x89PNG", b"\x00PNG")
        (broken / shard.name).write_bytes(content)
    line = refusal(capsys, train_contrastive, contrastive_arguments(broken, tmp_path / "run"))
    assert "samples in a row cannot be used" in line
    assert "broken image (24)" in line


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_its_settings_logs_and_one_checkpoint(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml", "env.json", "metrics.jsonl", "checkpoints", "train.log", "samples",
    }  # fmt: skip
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step_00000002"]
    image, text, plan, details, summary, done = (finished / "train.log").read_text().splitlines()
    assert image.endswith("image tower: random weights")
    assert text.endswith("text tower: random weights")
    assert "2 steps of 8 samples" in plan
    assert "plan: 8 samples x 1 process(es) x 1 part(s) a step; adamw, cosine" in details
    assert "summary: steps 1 to 2, 16 samples in " in summary
    assert f"done: {finished}/checkpoints/step_00000002" in done


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "is not empty: continue that run with --resume auto"),
        (["--resume=auto", "--contrastive.embed_dim=16"], "embed_dim was 8, is 16"),
        (["--resume=auto", "--optimizer.lr=0.5"], "optimizer.lr was 0.001, is 0.5"),
        (["--resume=auto", "--train.batch_size=6"], "batch_size was 8, is 6"),
        (["--resume=auto", "--seed=1"], "seed was 0, is 1"),
        (
            ["--resume=auto", "--image.frozen=true", "--image.init_from=x"],
            "frozen was false, is true",
        ),
    ],
)
def test_a_used_run_directory_is_not_mixed_up(
    capsys: pytest.CaptureFixture[str],
    shards: Path,
    finished: Path,
    options: list[str],
    message: str,
) -> None:
    before = snapshot(finished)
    arguments = contrastive_arguments(shards, finished, *options)
    assert message in refusal(capsys, train_contrastive, arguments)
    assert snapshot(finished) == before


def test_a_run_without_a_complete_checkpoint_is_not_restarted_silently(
    capsys: pytest.CaptureFixture[str], shards: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    (run_dir / "checkpoints" / "step_00000002" / "state.json").unlink()
    arguments = contrastive_arguments(shards, run_dir, "--resume=auto")
    with pytest.warns(UserWarning, match=r"passed over: .*state\.json is missing"):
        assert "no checkpoint" in refusal(capsys, train_contrastive, arguments)


def test_a_run_that_an_older_version_wrote_is_continued(
    capsys: pytest.CaptureFixture[str], shards: Path, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    settings = yaml.safe_load((run_dir / "config.yaml").read_text())
    del settings["text"]["slot_block_size"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = contrastive_arguments(shards, run_dir, "--resume=auto")
    assert "was 1, is 2" in refusal(
        capsys, train_contrastive, [*arguments, "--text.slot_block_size=2"]
    )
    train_contrastive.main(arguments)
    assert "already at step 2" in capsys.readouterr().out


def test_a_repeated_start_has_its_own_settings_on_record(
    shards: Path, finished: Path, tmp_path: Path
) -> None:
    """Of a run that failed before its first row, in whose folder it starts again."""
    failed = tmp_path / "run"
    failed.mkdir()
    for name in ("config.yaml", "env.json", "train.log"):
        shutil.copy(finished / name, failed / name)
    train_contrastive.main(contrastive_arguments(shards, failed, "--seed=7"))
    assert yaml.safe_load((failed / "config.yaml").read_text())["seed"] == 7


def test_a_checkpoint_starts_another_run_directory(
    shards: Path, finished: Path, tmp_path: Path
) -> None:
    checkpoint = finished / "checkpoints" / "step_00000002"
    options = (f"--resume={checkpoint}", "--train.steps=3")
    train_contrastive.main(contrastive_arguments(shards, tmp_path / "run", *options))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3]
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_loss_that_is_not_finite_exits_with_1(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    options = ("--optimizer.lr=1e38", "--train.steps=5")
    with pytest.raises(SystemExit) as stop:
        train_contrastive.main(contrastive_arguments(shards, tmp_path / "run", *options))
    assert stop.value.code == 1
    assert "lower optimizer.lr" in capsys.readouterr().err


def test_bfloat16_starts_with_the_loss_of_float32(
    shards: Path, finished: Path, tmp_path: Path
) -> None:
    evaluation = {"shards": f"{shards}/train-0.tar", "caption_key": "txt"}
    options = ("--train.precision=bf16", f"--evaluation=[{json.dumps(evaluation)}]")
    train_contrastive.main(contrastive_arguments(shards, tmp_path / "run", *options))
    first, expected = (
        json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
        for run_dir in (tmp_path / "run", finished)
    )
    assert first["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert first["loss"] != expected["loss"]
    figures = json.loads((tmp_path / "run" / "eval.jsonl").read_text())
    assert figures["samples"] == 16


def test_exit_codes_of_real_processes(run_python: Any, shards: Path, tmp_path: Path) -> None:
    arguments = contrastive_arguments(shards, tmp_path / "run", "--train.batch_size=99")
    result = run_python("-m", "scripts.train_contrastive", *arguments)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: train.batch_size 99 is larger than the data set of 24 samples: choose a smaller"
        " batch or more shards"
    ]
    assert result.stdout == ""

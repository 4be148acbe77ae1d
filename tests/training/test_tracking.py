"""What a run shows: trackers, the first batches, learning rates, a summary, curves."""

from __future__ import annotations

import io
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.cli import parse_config
from scripts.plot_run import main as plot
from scripts.pretrain import PretrainRun
from tests.training.test_loop import Regression, RowStream, make_trainer, metrics
from training.objective import Batch
from training.plan import check_settings
from training.run_directory import flat_settings
from training.sample_sheet import SIDE, draw_sheet


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Pictures(RowStream):
    """Adds pictures, which the task does not look at, to rows."""

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        for batch in super().batches(start_step):
            yield batch | {"image": torch.full((8, 3, 4, 4), 200, dtype=torch.uint8)}


def test_a_sheet_shows_pictures_with_captions_beneath() -> None:
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    images[4, 0] = 255
    sheet = draw_sheet(images, ["one", "two", "漢字 are replaced", "", "a red square " * 30])
    below = (8, 8 + SIDE + 44 + SIDE, 8 + SIDE, sheet.height)
    assert sheet.size == (4 * (SIDE + 8) + 8, 2 * (SIDE + 44) + 8)
    assert sheet.getpixel((SIDE // 2, 8 + SIDE + 44 + SIDE // 2)) == (255, 0, 0)
    assert sheet.crop(below).convert("L").getextrema()[0] < 100  # ink


def test_the_first_batches_are_drawn_for_tensorboard_too(tmp_path: Path) -> None:
    make_trainer(tmp_path, stream=Pictures(), tensorboard=True, steps=3).fit()
    files = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in files] == ["step_00000001.png", "step_00000002.png"]
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0})
    events.Reload()
    sent = events.Images("samples")
    assert [image.step for image in sent] == [1, 2]
    with Image.open(io.BytesIO(sent[0].encoded_image_string)) as one, Image.open(files[0]) as two:
        assert one.convert("RGB").tobytes() == two.convert("RGB").tobytes()


def test_rows_tell_memory_arithmetic_and_the_summary_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Known(Regression):
        def training_flops(self) -> float:
            return 3e9

    make_trainer(tmp_path, Known, peak_tflops=2.0, steps=3).fit()
    row = rows(tmp_path)[-1]
    assert row["memory_gb"] > 0.05
    assert row["tflops"] == pytest.approx(3e-3 * row["samples_per_second"], rel=0.01, abs=1e-4)
    assert row["mfu"] == pytest.approx(row["tflops"] / 2, abs=1e-4)
    assert capsys.readouterr().out.count("summary: steps 1 to 3, 24 samples in ") == 1


def test_a_run_that_fails_has_a_summary_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no more")

    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("training.tracking.Tracking.row", fails)
    with pytest.raises(ValueError, match="no more"):
        trainer.fit()
    assert "summary: steps 1 to 1, 8 samples" in capsys.readouterr().out


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = flat_settings({"train": {"steps": 3}, "evaluation": [{"name": "a"}]})
    options: dict[str, Any] = {"stream": Pictures(), "settings": settings}
    make_trainer(tmp_path, trackers=["wandb"], steps=3, **options).fit()
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    wanted = (b"metrics/loss", b"train.steps", b"metrics/grad_norm", b"media/images/samples_")
    deadline = time.monotonic() + 60  # wandb's own process writes it
    while not all(words in record.read_bytes() for words in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(record.parent.glob("files/media/images/samples_*.png"))) == 2
    assert (tmp_path / "tracker_id.txt").read_text().strip().encode() in record.name.encode()


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(PretrainRun, ["--train.trackers=[swanlab]"], "")
    monkeypatch.setattr("training.tracking.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"swanlab is not installed: pip install"):
        check_settings(config.train, config.optimizer, 1, [])


def test_curves_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        make_trainer(tmp_path / name, steps=4, accelerator=Accelerator(cpu=True)).fit()
    runs = [str(tmp_path / name) for name in ("one", "two")]
    plot(runs)
    assert (tmp_path / "one" / "plots" / "curves.png").stat().st_size > 10_000
    plot([*runs, "--only=loss", f"--output={tmp_path / 'loss.png'}"])
    with Image.open(tmp_path / "loss.png") as picture:
        colours = {c for _, c in picture.convert("RGB").getcolors(1 << 20) or ()}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # both runs are drawn
    for arguments, message in (
        ([*runs, "--only=nothing"], "no figure ['nothing']; there are data_wait, error"),
        ([str(tmp_path)], "has no rows in metrics.jsonl"),
    ):
        with pytest.raises(SystemExit):
            plot(arguments)
        assert message in capsys.readouterr().err


TRACKED = """
import sys
from pathlib import Path
from tests.training.test_loop import make_trainer, quiet
folder = Path(sys.argv[1])
for resume in (None, folder / "checkpoints" / "step_00000002"):
    settings = {"settings": {"train.steps": "3"}, "save_every": 2, "keep_last": 3}
    make_trainer(folder, quiet, trackers=["trackio"], steps=3, resume=resume, **settings).fit()
"""


@pytest.mark.slow
def test_trackio_without_a_network(tmp_path: Path, run_python: Any) -> None:
    folder, kept = tmp_path / "run", tmp_path / "kept"
    offline = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
    result = run_python("-c", TRACKED, folder, TRACKIO_DIR=str(kept), **offline)
    assert result.returncode == 0, result.stderr[-2000:]
    with closing(sqlite3.connect(kept / "softmoe-clip.db")) as base:
        rows = list(base.execute("select run_name, step, metrics from metrics order by id"))
        ((config,),) = base.execute("select config from configs")
    # A resumed run goes on in its own record, and sends again what it repeats.
    assert [step for _, step, _ in rows] == [1, 2, 3, 3]
    run_id = (folder / "tracker_id.txt").read_text().strip()
    assert {name for name, _, _ in rows} == {f"run-{run_id}"}
    assert json.loads(rows[0][2])["metrics/loss"] == pytest.approx(metrics(folder)[0]["loss"])
    assert json.loads(config)["train.steps"] == "3"

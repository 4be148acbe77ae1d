"""The whole pipeline on the embedded emoji pictures: pretrain, train contrastively, evaluate, show.

    python -m scripts.demo
    make demo-long

Every stage is one of the project's commands, printed before it runs. Interrupted, the same command
goes on where it stopped.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.cli import parse_config, run

DATA = Path("data/emoji")  # where the presets read from


@dataclass
class DemoRun:
    """The presets of the stages."""

    run_dir: str = "runs/demo"
    """Folder for the two runs, the figures and report.html."""
    pretrain: str | None = "configs/demo_pretrain.yaml"
    """Preset of the classification stage; null trains contrastively from scratch."""
    contrastive: str = "configs/demo_contrastive.yaml"
    evaluate: str = "configs/demo_evaluate.yaml"


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DemoRun, argv, __doc__ or "")
    run(lambda: demo(config))


def demo(config: DemoRun) -> None:
    from data_pipelines.emoji.prepare import prepare

    start = time.monotonic()
    folder = Path(config.run_dir)
    prepare(DATA)
    contrastive = ["--config", config.contrastive, "--run_dir", str(folder / "contrastive")]
    seconds: dict[str, float] = {}
    if config.pretrain is not None:
        seconds["pretraining"] = _command(
            "scripts.pretrain", "--config", config.pretrain,
            "--run_dir", str(folder / "pretrain"), "--resume", "auto",
        )  # fmt: skip
        contrastive += ["--image.init_from", str(folder / "pretrain")]
    seconds["contrastive training"] = _command(
        "scripts.train_contrastive", *contrastive, "--resume", "auto"
    )
    seconds["evaluation"] = _command(
        "scripts.evaluate", "--config", config.evaluate, "--model", str(folder / "contrastive"),
        "--output", str(folder / "evaluation.json"),
    )  # fmt: skip
    from scripts.demo_report import build_report

    report = build_report(folder, DATA, seconds)
    total = (time.monotonic() - start) / 60
    print(f"\nreport: {report}   ({total:.1f} minutes)")


def _command(module: str, *arguments: str) -> float:
    """Run one of the project's commands; returns seconds, or stops with its exit code."""
    print(f"\n$ python -m {module} {shlex.join(arguments)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code:
        raise SystemExit(code)
    return time.monotonic() - start


def read_records(path: Path) -> dict[tuple[str, str], dict[str, float | None]]:
    """Metrics by (data set, task) from a file that `scripts.evaluate` wrote."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return {(record["dataset"], record["task"]): record["metrics"] for record in records}


if __name__ == "__main__":
    main()

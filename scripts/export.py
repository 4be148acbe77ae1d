"""Write a trained model as a folder that other libraries open, and push it to the hub.

python -m scripts.export RUN --to open_clip --out DIR
python -m scripts.export RUN --to transformers --out DIR --license apache-2.0 --push ORG/NAME

RUN is a run directory (its newest complete checkpoint), a checkpoint, or a folder of upcycled
weights. See docs/export.md.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scripts.cli import parse_config, run


@dataclass
class Export:
    """From what, to what."""

    model: str = ""
    """Run directory or checkpoint; may stand without `--model`, first."""
    to: Literal["open_clip", "timm", "transformers", "sentence-transformers", "onnx"] = "open_clip"
    """The library that is to open the folder. Models of classification runs go to timm."""
    out: str = ""
    """A new folder."""
    weights: Literal["checkpoint", "average", "training"] = "checkpoint"
    """Those that the checkpoint opens with, their moving average (of runs with train.ema_decay),
    or those in training (where train.ema_export made the checkpoint open with the average)."""
    license: str | None = None
    """Licence of the weights, by the hub's name for it such as apache-2.0, mit, cc-by-nc-4.0 or
    other. It follows from the data and is yours to state: null leaves it open, and nothing is
    pushed."""
    push: str | None = None
    """owner/name on the Hugging Face hub, which is created if it is not there."""
    private: bool = True
    """Whether the repository is private; one that is there and public is then refused."""
    dry_run: bool = False
    """List the files that would be pushed, with sizes and hashes, and push nothing."""


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    config = parse_config(Export, words, __doc__ or "")
    run(lambda: export(config))


def export(config: Export) -> None:
    """Open the checkpoint, write the folder with its card, say how to open it, push it."""
    out = _check(config)
    from encoders.export.hub_upload import upload, upload_listing
    from encoders.export.model_card import write_card
    from scripts.export_card import describe
    from scripts.export_source import find_source, run_facts

    source = find_source(config.model)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        opened = _open(config, source)
        # Before it is written, which may leave parts of the model behind.
        run = run_facts(source, opened.model, config.weights)
        model = _write(config, opened, partial, out)
        card = describe(
            model, run, config.to, str(out), config.license, config.push, config.weights
        )
        write_card(card, partial)
        if out.exists():
            out.rmdir()  # empty, or it would have been refused
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{source.folder} written to {out}; open it with\n\n{card.code}\n")
    if config.push is None:
        return
    if config.dry_run:
        print(f"{config.push} would get:")
        for name, size, digest in upload_listing(out):
            print(f"{size:>14,}  {digest[:16]}  {name}")
        return
    print(upload(out, config.push, config.private, f"Exported for {config.to}"))


def _check(config: Export) -> Path:
    from encoders.export.hub_upload import check_hub_name, check_token

    for name in ("model", "out"):
        if not getattr(config, name):
            raise ValueError(f"{name} is not given: python -m scripts.export RUN --out FOLDER")
    out = Path(config.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out '{out}' exists already: choose another folder")
    if config.push is not None:
        check_hub_name(config.push)
        if config.license is None and not config.dry_run:
            raise ValueError(
                "push needs --license, the licence of the weights, such as apache-2.0, cc-by-nc-4.0"
                " or other: it follows from what they were trained on, so nobody can guess it"
            )
        if not config.dry_run:
            check_token()
    elif config.dry_run:
        raise ValueError("dry_run lists what would be pushed: set --push owner/name")
    return out


def _open(config: Export, source: Any) -> Any:
    """The dual encoder or classifier of the checkpoint, with the weights that are asked for."""
    from encoders.export.model import ExportError
    from scripts.export_source import choose_weights, open_classifier, open_dual_encoder

    if not source.is_dual_encoder and config.to != "timm":
        raise ExportError(
            f"'{source.folder}' is an image classifier, without texts: choose --to timm, which"
            " transformers opens, too"
        )
    opened = open_dual_encoder(source) if source.is_dual_encoder else open_classifier(source)
    choose_weights(opened.model, source, config.weights)
    return opened


def _write(config: Export, encoder: Any, folder: Path, out: Path) -> Any:
    """The folder without its card; returns the model, of which timm gets the image tower alone."""
    from encoders.export.model import DualEncoder, image_tower
    from encoders.export.timm_folder import write_timm

    if config.to == "timm":
        image = image_tower(encoder) if isinstance(encoder, DualEncoder) else encoder
        write_timm(image, folder)
        return image
    if config.to == "open_clip":
        from encoders.export.open_clip_folder import write_open_clip

        write_open_clip(encoder, folder, out, config.push)
    elif config.to == "transformers":
        from encoders.export.transformers_folder import write_transformers

        write_transformers(encoder, folder)
    elif config.to == "sentence-transformers":
        from encoders.export.sentence_transformers_folder import write_sentence_transformers

        write_sentence_transformers(encoder, folder)
    else:
        from encoders.export.onnx_folder import write_onnx

        write_onnx(encoder, folder)
    return encoder


if __name__ == "__main__":
    main()

"""Turn a dense vision transformer's checkpoint into a Soft MoE one (sparse upcycling).

python -m scripts.upcycle runs/dense --to soft_moe_vit_small_patch16_224 --out runs/upcycled

What was copied, resampled and drawn anew is printed. timm (`local-dir:<out>`), image.init_from and
scripts.inspect_model open the result.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.cli import parse_config, run


@dataclass
class Upcycling:
    """From what to what."""

    checkpoint: str = ""
    """Run directory or checkpoint of a dense model, ours, or a folder that timm saved; may stand
    without `--checkpoint`, first."""
    to: str = "soft_moe_vit_small_patch16_224"
    """One of our routed models, with the widths and depth of the dense one; grid and patch size
    may differ."""
    out: str = ""
    """A new folder for weights and timm's config.json."""
    expert_noise_std: float = 0.0
    """Deviation of noise that sets the experts apart; Soft MoE needs none."""
    allow: list[str] = field(default_factory=lambda: ["cls_token", "*.[qk]_norm.weight"])
    """Shell patterns of parameters that may be left out, or keep the values they were drawn with;
    those of the default are what timm's vision transformers have otherwise."""
    seed: int = 0
    """Of what is drawn anew."""


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--checkpoint")
    config = parse_config(Upcycling, words, __doc__ or "")
    run(lambda: upcycle_checkpoint(config))


def upcycle_checkpoint(config: Upcycling) -> None:
    """Read the dense model, fill the routed one, write it, and say what became of what."""
    out = _check(config)
    import timm
    import torch

    from encoders.upcycle import upcycle
    from eval.image_tower import open_image_tower

    dense = open_image_tower(config.checkpoint)
    if not dense.trained:
        raise ValueError(f"checkpoint '{config.checkpoint}' is no folder: give one with weights")
    torch.manual_seed(config.seed)
    model: Any = timm.create_model(config.to, num_classes=dense.model.num_classes)
    own = model.pretrained_cfg
    if (dense.mean, dense.std) != (own["mean"], own["std"]):
        print(
            f"note: pixels had mean {dense.mean} and deviation {dense.std}; {config.to} is trained"
            f" on with {own['mean']} and {own['std']}"
        )
    print(
        upcycle(
            model,
            dense.model.state_dict(),
            expert_noise_std=config.expert_noise_std,
            allow=config.allow,
        )
    )
    _write(model, config.to, out)
    print(f"written to {out}")


def _check(config: Upcycling) -> Path:
    from encoders.variants import DENSE_TWINS

    for name in ("checkpoint", "out"):
        if not getattr(config, name):
            raise ValueError(f"{name} is not given: python -m scripts.upcycle FOLDER --out FOLDER")
    if config.to not in DENSE_TWINS:
        raise ValueError(f"to '{config.to}': choose one of {', '.join(DENSE_TWINS)}")
    out = Path(config.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out '{out}' exists already: choose another folder")
    return out


def _write(model: Any, name: str, out: Path) -> None:
    """A folder as classification runs write their checkpoints."""
    from classification.config import ClassifierConfig
    from classification.objective import ClassificationObjective
    from training.checkpoint import save_tensors

    out.mkdir(parents=True, exist_ok=True)
    objective = ClassificationObjective(model, ClassifierConfig(name), model.num_classes)
    save_tensors(model.state_dict(), out / objective.weights_file)
    for file, content in objective.config_files().items():
        (out / file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

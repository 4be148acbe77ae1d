"""Opens exports where our wheel is installed: python with_package.py ROOT EXPORTS."""

from __future__ import annotations

import sys
from pathlib import Path

from openers import (
    Expected,
    from_onnx,
    from_open_clip,
    from_sentence_transformers,
    from_timm,
    from_timm_classifier,
    from_transformers,
    leave,
    run_card,
    tell,
)


def main(root: str, exports: Path) -> None:
    leave(root)  # before anything of ours is imported
    from safetensors.torch import load_file

    import encoders

    report = {"encoders": encoders.__file__}
    folders = {name: exports / name for name in ("clip", "sigmoid", "bert")}
    expected = {name: Expected(folder) for name, folder in folders.items()}
    for name in ("clip", "bert"):
        report[f"{name} open_clip"] = from_open_clip(folders[name] / "open_clip", expected[name])
    for name in ("clip", "sigmoid"):
        report[f"{name} timm"] = from_timm(folders[name] / "timm", expected[name])
    import encoders.transformers_clip

    for name in ("clip", "sigmoid", "bert"):
        place = folders[name] / "transformers"
        report[f"{name} transformers"] = from_transformers(place, expected[name])
    for name in ("sigmoid", "bert"):
        place = folders[name] / "sentence-transformers"
        report[f"{name} sentence-transformers"] = from_sentence_transformers(place, expected[name])
    report["bert onnx"] = from_onnx(folders["bert"] / "onnx", expected["bert"])
    logits = load_file(exports / "classifier" / "source" / "expected")
    report["classifier timm"] = from_timm_classifier(exports / "classifier" / "timm", logits)
    report["remote code"] = any(name.startswith("transformers_modules") for name in sys.modules)
    cards = (("bert", "open_clip"), ("sigmoid", "timm"))
    report["cards"] = {target: run_card(exports / name / target) for name, target in cards}
    tell(report)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

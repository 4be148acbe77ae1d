"""Opens exports where nothing of ours is installed: python without_package.py ROOT EXPORTS."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from openers import (
    Expected,
    from_onnx,
    from_sentence_transformers,
    from_transformers,
    leave,
    run_card,
    tell,
)

root, exports = sys.argv[1], Path(sys.argv[2])
leave(root)
ours = ("classification", "contrastive", "data_pipelines", "encoders", "eval", "training")
report = {"found": [name for name in ours if find_spec(name)]}
for name in ("clip", "sigmoid", "bert"):
    place, expected = exports / name / "transformers", Expected(exports / name)
    report[f"{name} transformers"] = from_transformers(place, expected, trust_remote_code=True)
for name in ("sigmoid", "bert"):
    place, expected = exports / name / "sentence-transformers", Expected(exports / name)
    report[f"{name} sentence-transformers"] = from_sentence_transformers(
        place, expected, trust_remote_code=True
    )
report["bert onnx"] = from_onnx(exports / "bert" / "onnx", Expected(exports / "bert"))
cards = (("sigmoid", "transformers"), ("bert", "sentence-transformers"), ("bert", "onnx"))
report["cards"] = {target: run_card(exports / name / target) for name, target in cards}
report["ours"] = [name for name in sys.modules if name.partition(".")[0] in ours]
tell(report)

"""A folder that sentence-transformers opens, for pictures and for strings."""

from __future__ import annotations

from pathlib import Path

from encoders.export.model import DualEncoder, save_json
from encoders.export.transformers_folder import write_transformers

MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)
EMBEDDING = "sentence_embedding"


def write_sentence_transformers(encoder: DualEncoder, folder: Path) -> None:
    """Write a transformers folder, and how sentence-transformers is to call it.

    Embeddings have length 1, so that inner products are cosines.

    Args:
        encoder: what to write.
        folder: exists, and is empty.

    Raises:
        ExportError: see `write_transformers`.
    """
    write_transformers(encoder, folder)
    save_json(
        [
            {"idx": number, "name": str(number), "path": path, "type": kind}
            for number, (path, kind) in enumerate(MODULES)
        ],
        folder / "modules.json",
    )
    methods = {
        modality: {
            "method": f"get_{modality}_features",
            "method_output_name": "pooler_output",
        }
        for modality in ("text", "image")
    }
    save_json(
        {
            "transformer_task": "feature-extraction",
            "modality_config": methods,
            "module_output_name": EMBEDDING,
            "processing_kwargs": {"text": {"truncation": True}},
        },
        folder / "sentence_bert_config.json",
    )
    save_json({"similarity_fn_name": "cosine"}, folder / "config_sentence_transformers.json")
    (folder / "1_Normalize").mkdir()
    save_json(
        {"module_input_name": EMBEDDING, "module_output_name": EMBEDDING},
        folder / "1_Normalize" / "config.json",
    )

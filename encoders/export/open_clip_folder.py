"""A folder that stock open_clip opens: `create_model_and_transforms("local-dir:FOLDER")`."""

from __future__ import annotations

from pathlib import Path

from encoders.clip_model import ARGUMENTS, opens_in_open_clip
from encoders.export.model import DualEncoder, ExportError, save_json, save_weights
from encoders.export.tokenizer import save_tokenizer
from encoders.hugging_face_text import TEXT_FOLDER

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write_open_clip(encoder: DualEncoder, folder: Path, hub_name: str | None = None) -> None:
    """Write config, weights and tokenizer.

    Args:
        encoder: what to write.
        folder: exists, and is empty.
        hub_name: owner/name that the folder is for. open_clip looks for the config of a Hugging
            Face text tower by a path or a name on the hub: this one, or `folder` as it is now.

    Raises:
        ExportError: a model that open_clip 3.3 cannot build.
    """
    if not opens_in_open_clip(encoder.config):
        raise ExportError(f"{_reason(encoder)}: choose --to transformers, which can hold it")
    config = dict(encoder.config)
    if encoder.text_model is not None:
        save_json(encoder.text_model, folder / TEXT_FOLDER / "config.json")
        place = str((folder / TEXT_FOLDER).absolute())
        if hub_name is not None:
            save_json(encoder.text_model, folder / "config.json")  # where a name is looked up
            place = hub_name
        config["text_cfg"] = config["text_cfg"] | {
            "hf_model_name": place,
            "hf_tokenizer_name": hub_name or str(folder.absolute()),
            "hf_model_pretrained": False,
        }
    save_json({"model_cfg": config, "preprocess_cfg": encoder.preprocess}, folder / CONFIG)
    save_weights(encoder.model, folder / WEIGHTS)
    save_tokenizer(encoder, folder)


def _reason(encoder: DualEncoder) -> str:
    if ARGUMENTS in encoder.config["vision_cfg"]:
        return f"open_clip has no words for {ARGUMENTS} of the image tower (image.arguments)"
    return "open_clip cannot build this text tower (text.moe_blocks, text.pooling or text.kind)"

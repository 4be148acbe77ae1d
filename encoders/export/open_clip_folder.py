"""A folder that stock open_clip opens: `create_model_and_transforms("local-dir:FOLDER")`."""

from __future__ import annotations

from pathlib import Path

from encoders.clip_model import ARGUMENTS, opens_in_open_clip
from encoders.export.model import DualEncoder, ExportError, save_json, save_weights
from encoders.export.tokenizer import save_tokenizer
from encoders.hugging_face_text import TEXT_FOLDER

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def write_open_clip(
    encoder: DualEncoder, folder: Path, place: Path | None = None, hub_name: str | None = None
) -> None:
    """Write config, weights and tokenizer.

    Args:
        encoder: what to write.
        folder: exists, and is empty.
        place: where the folder will be; `folder` if None. open_clip looks for the config of a
            Hugging Face text tower by an absolute path, or by a name on the hub.
        hub_name: owner/name on the hub that the folder is for, in place of the path.

    Raises:
        ExportError: a model that open_clip 3.3 cannot build.
    """
    if not opens_in_open_clip(encoder.config):
        raise ExportError(f"{_reason(encoder)}: choose --to transformers, which can hold it")
    config = dict(encoder.config)
    if encoder.text_model is not None:
        save_json(encoder.text_model, folder / TEXT_FOLDER / "config.json")
        if hub_name is not None:
            save_json(encoder.text_model, folder / "config.json")  # where a name is looked up
        there = (place or folder).absolute()
        config["text_cfg"] = config["text_cfg"] | {
            "hf_model_name": hub_name or str(there / TEXT_FOLDER),
            "hf_tokenizer_name": hub_name or str(there),
            "hf_model_pretrained": False,
        }
    save_json({"model_cfg": config, "preprocess_cfg": encoder.preprocess}, folder / CONFIG)
    save_weights(encoder.model, folder / WEIGHTS)
    if encoder.text_model is None:
        save_tokenizer(encoder, folder)
    else:  # open_clip cleans texts itself
        encoder.tokenizer.save_pretrained(folder)


def _reason(encoder: DualEncoder) -> str:
    if ARGUMENTS in encoder.config["vision_cfg"]:
        return f"open_clip has no words for {ARGUMENTS} of the image tower (image.arguments)"
    return "open_clip cannot build this text tower (text.moe_blocks, text.pooling or text.kind)"

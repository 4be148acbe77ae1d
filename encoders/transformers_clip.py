"""Dual encoders as transformers models, for its Auto classes and its zero-shot pipeline.

Importing this module registers them, so that `AutoModel.from_pretrained(folder)` opens what
`encoders.export.transformers_folder` writes. There are two, because transformers turns logits into
scores by the name of the model type: by a sigmoid if it contains "siglip", by a softmax otherwise.
Parameters have the names that they have in open_clip.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import ModelOutput

from encoders.clip_model import build_clip

# Of the CLIP vocabulary: the mark that ends a text, and what follows it.
END, PADDING = 49407, 0


class SoftMoEClipConfig(PretrainedConfig):
    """Description of a dual encoder that was trained with the softmax loss.

    Args:
        model_cfg: as in an `open_clip_config.json`.
        text_model: the `config.json` of a Hugging Face text tower, None for the other kinds.
    """

    model_type = "soft_moe_clip"

    def __init__(
        self,
        model_cfg: dict[str, Any] | None = None,
        text_model: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model_cfg, self.text_model = model_cfg or {}, text_model
        # By the names under which other libraries look for them.
        self.projection_dim = self.hidden_size = self.model_cfg.get("embed_dim")
        super().__init__(**kwargs)


class SoftMoESiglipConfig(SoftMoEClipConfig):
    """Description of a dual encoder that was trained with the sigmoid loss."""

    model_type = "soft_moe_siglip"

    def __init__(self, **kwargs: Any) -> None:  # transformers makes another where there is none
        super().__init__(**kwargs)


@dataclass
class SoftMoEClipOutput(ModelOutput):
    """Scaled and shifted products of unit embeddings.

    `logits_per_image` (B, T), `logits_per_text` (T, B), `image_embeds` (B, D), `text_embeds`
    (T, D); the embeddings have length 1.
    """

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None


class SoftMoEClipModel(PreTrainedModel):
    """open_clip's dual encoder around our image towers, as transformers calls one.

    Pixels are normalised floats (B, 3, S, S), as the processor of the folder makes them.
    """

    config_class = SoftMoEClipConfig
    main_input_name = "pixel_values"
    input_modalities: Any = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # transformers makes models on the meta device, where constants have no values.
        with torch.device("cpu"):
            model: Any = _build(config).to(torch.get_default_dtype())  # the type asked for
        self.visual, self.text = model.visual, model.text
        self.logit_scale, self.logit_bias = model.logit_scale, model.logit_bias
        text = config.model_cfg["text_cfg"]
        self.context_length: int = text["context_length"]
        self._bytes = "hf_model_name" not in text  # whether texts are of the CLIP vocabulary
        self._padding = PADDING if self._bytes else model.text.config.pad_token_id
        for module in self.modules():
            names = module._non_persistent_buffers_set
            if names:  # they are in no checkpoint, and transformers empties them
                constants = {name: getattr(module, name).clone() for name in names}
                module.__dict__["constants"] = constants  # not moved with the module
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Nothing is drawn: the towers were, and a checkpoint holds all parameters."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """What transformers calls when weights are loaded: constants are put back."""
        super().initialize_weights()
        for module in self.modules():
            for name, value in getattr(module, "constants", {}).items():
                getattr(module, name).copy_(value)

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def get_input_embeddings(self) -> Any:
        """None: pixels have no table, and texts are embedded inside their tower."""
        return None

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Embeddings (B, D) of pixels (B, 3, S, S) as `pooler_output`, of any length."""
        return BaseModelOutputWithPooling(pooler_output=self.visual(pixel_values))

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Embeddings (T, D) of token ids int64 (T, L) as `pooler_output`, of any length.

        How rows are padded does not matter, and longer texts than the tower reads are cut.

        Args:
            input_ids: with start and end marks, as the tokenizer of the folder makes them.
            attention_mask: (T, L), 0 where there is padding; None finds it by the end mark or the
                padding id.
        """
        return BaseModelOutputWithPooling(
            pooler_output=self.text(self._plain_ids(input_ids, attention_mask))
        )

    def _plain_ids(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Token ids as the text tower was trained on them."""
        if self._bytes:  # the tokenizer of the folder pads with the end mark
            ends = ids == END
            kept = ends.cumsum(1) - ends.long() == 0
        else:
            kept = ids != self._padding if mask is None else mask.bool()
        ids = ids.masked_fill(~kept, self._padding)
        if ids.shape[1] <= self.context_length:
            # open_clip's transformer takes one length only; the others do not see the padding.
            return F.pad(ids, (0, self.context_length - ids.shape[1]), value=self._padding)
        lengths = kept.sum(1, keepdim=True)
        last = ids.gather(1, lengths.sub(1).clamp(min=0))
        ids = ids[:, : self.context_length]
        final = torch.where(lengths > self.context_length, last, ids[:, -1:])
        return torch.cat([ids[:, :-1], final], dim=1)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SoftMoEClipOutput | tuple[Tensor, ...]:
        """Logits and embeddings of all pairs of B images and T texts."""
        image = F.normalize(self.visual(pixel_values), dim=-1)
        text = F.normalize(self.text(self._plain_ids(input_ids, attention_mask)), dim=-1)
        logits = self.logit_scale.exp() * image @ text.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        output = SoftMoEClipOutput(logits, logits.T, text, image)
        return output.to_tuple() if return_dict is False else output


class SoftMoESiglipModel(SoftMoEClipModel):
    """The same, for the sigmoid loss."""

    config_class = SoftMoESiglipConfig


def _build(config: Any) -> Any:
    """The dual encoder of a config, with random weights."""
    if config.text_model is None:
        return build_clip(config.model_cfg)
    with TemporaryDirectory() as folder:  # where open_clip reads the config of a text model
        (Path(folder) / "config.json").write_text(json.dumps(config.text_model), encoding="utf-8")
        own = {"hf_model_name": folder, "hf_tokenizer_name": folder, "hf_model_pretrained": False}
        text = config.model_cfg["text_cfg"] | own
        return build_clip(config.model_cfg | {"text_cfg": text})


def register() -> None:
    """Make the models known to transformers; again, if another copy of this code was loaded."""
    pairs = ((SoftMoEClipConfig, SoftMoEClipModel), (SoftMoESiglipConfig, SoftMoESiglipModel))
    for config, model in pairs:
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)
        AutoModelForZeroShotImageClassification.register(config, model, exist_ok=True)
        # The pipeline looks names up here, and calls others unsupported before it uses them.
        MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES[config.model_type] = model.__name__


register()

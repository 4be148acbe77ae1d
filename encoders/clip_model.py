"""Dual encoders from their description, as open_clip's factory builds them, and those it cannot.

A description is the `model_cfg` of an `open_clip_config.json`. Four things in it are beyond
open_clip 3.3, which refuses them: Soft MoE in its text transformer, a bag of words in its place,
arguments of the timm image model, and pooling a Hugging Face model by its last token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock
from timm.layers import Mlp
from torch import nn

from encoders.bag_of_words import BagOfWords
from encoders.causal_soft_moe import CausalSoftMoE
from encoders.hugging_face_text import LAST_TOKEN, POOLERS, LastTokenPooler, text_model_folder
from encoders.text_towers import BAG_OF_WORDS, ROUTED_BLOCKS
from encoders.variants import create_encoder, input_size

# The name that open_clip has given them after release 3.3.
ARGUMENTS = "timm_model_kwargs"
# Arguments that the other parts of a description stand for.
DESCRIBED = ("drop_path_rate", "global_pool", "num_classes", "patch_drop_rate")
# What open_clip builds where our own tower goes, as small as can be.
PLACEHOLDER = {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32}
SMALLEST_TEXT = {"layers": 1, "width": 8, "heads": 1}
BAG_SIZES = ("vocab_size", "width", "context_length")


def vision_config(
    name: str,
    arguments: Mapping[str, Any],
    drop_path: float = 0.0,
    patch_dropout: float = 0.0,
    pooling: Literal["avg", "token", "map"] = "avg",
    projection: Literal["linear", "mlp"] = "linear",
    setting: str = "arguments",
) -> dict[str, Any]:
    """`vision_cfg` of a timm model with a projection.

    Args:
        name: of the timm model.
        arguments: of its constructor; with any, open_clip 3.3 cannot open the model.
        drop_path: stochastic depth rate of the last block.
        patch_dropout: share of patches dropped in training.
        pooling: mean of the tokens, class token, or the model's attention pool.
        projection: a linear map to the joint space, or two with a GELU between.
        setting: what messages call `arguments`.

    Raises:
        ValueError: timm does not know the name, or an argument is not free to choose.
    """
    taken = sorted(arguments.keys() & set(DESCRIBED))
    if taken:
        raise ValueError(f"{setting} must not set {', '.join(taken)}: other settings do")
    config: dict[str, Any] = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": pooling,
        "timm_proj": projection,
        "image_size": input_size(name, arguments),
    }
    if drop_path:
        config["timm_drop_path"] = drop_path
    if patch_dropout:
        config["patch_dropout"] = patch_dropout
    if arguments:
        config[ARGUMENTS] = dict(arguments)
    return config


def opens_in_open_clip(model_config: Mapping[str, Any]) -> bool:
    """Whether open_clip 3.3 builds the described model, too."""
    text = model_config["text_cfg"]
    return not (
        ROUTED_BLOCKS in text
        or BAG_OF_WORDS in text
        or text.get("hf_pooler_type") == LAST_TOKEN
        or ARGUMENTS in model_config["vision_cfg"]
    )


def build_clip(model_config: Mapping[str, Any], output_dict: bool = False) -> CustomTextCLIP:
    """A fresh open_clip dual encoder from its description.

    What open_clip can build is built by open_clip. The experts of a routed text block start as the
    MLP that open_clip has drawn for it, so that the tower starts with open_clip's variances; their
    GELU is the tanh form.

    Args:
        model_config: `model_cfg` of an `open_clip_config.json` with `custom_text`.
        output_dict: whether calls return a dict of features.

    Raises:
        ValueError: the image model does not take its arguments.
    """
    config: Any = {name: value for name, value in model_config.items() if name != "custom_text"}
    text, vision = dict(config["text_cfg"]), dict(config["vision_cfg"])
    routed = text.pop(ROUTED_BLOCKS, None)
    last = text.get("hf_pooler_type") == LAST_TOKEN
    if last:
        text["hf_pooler_type"] = POOLERS["mean"]
    if "hf_model_name" in text:  # open_clip would ask the hub again
        text["hf_model_name"] = str(text_model_folder(text["hf_model_name"]))
    words = text.pop(BAG_OF_WORDS, False)
    if words:
        text |= SMALLEST_TEXT
    changes: Any = {"text_cfg": text, "vision_cfg": PLACEHOLDER if ARGUMENTS in vision else vision}
    try:
        model: Any = CustomTextCLIP(**config | changes, output_dict=output_dict)
        if ARGUMENTS in vision:
            model.visual = TimmTower(config["embed_dim"], vision)
    except AssertionError as error:  # timm's answer to a pooling that the model has no parts for
        raise ValueError(
            f"{vision['timm_model_name']} cannot pool by '{vision['timm_pool']}': choose another"
            " image.pooling"
        ) from error
    if words:
        sizes = {name: config["text_cfg"][name] for name in BAG_SIZES}
        model.text = BagOfWords(embed_dim=config["embed_dim"], **sizes)
    if routed is not None:
        options = {name: value for name, value in routed.items() if name != "blocks"}
        layers: Any = model.text.transformer.resblocks
        for index in routed["blocks"]:
            layers[index] = _route(layers[index], options)
    if last:
        model.text.pooler = LastTokenPooler()
    if "hf_model_name" in text:
        model.text.transformer.float()  # built in the type that the model was published in
    return model


class TimmTower(TimmModel):
    """open_clip's adapter, with its pooling and projection, around a timm model with arguments."""

    def __init__(self, embed_dim: int, config: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)  # the parts are ours
        fixed = {
            name: config[key]
            for name, key in (
                ("drop_path_rate", "timm_drop_path"),
                ("patch_drop_rate", "patch_dropout"),
            )
            if config.get(key)
        }
        self.image_size = (config["image_size"],) * 2
        self.trunk: Any = create_encoder(
            config["timm_model_name"], config[ARGUMENTS], "image.arguments", **fixed
        )
        self.trunk.reset_classifier(0, global_pool=config["timm_pool"])
        width = getattr(self.trunk, "head_hidden_size", self.trunk.num_features)
        name, projection = config["timm_proj"], nn.Linear(width, embed_dim, bias=False)
        head: dict[str, nn.Module] = {"proj": projection}
        if name == "mlp":
            head = {"mlp": Mlp(width, 2 * embed_dim, embed_dim, bias=(True, False))}
        self.head = nn.Sequential(OrderedDict(head))


class RoutedTextBlock(ResidualAttentionBlock):
    """The parts of an open_clip block with another module in place of its MLP."""

    def __init__(self, dense: ResidualAttentionBlock, mlp: CausalSoftMoE) -> None:
        nn.Module.__init__(self)  # the parts exist already
        for name, module in dense.named_children():
            self.add_module(name, mlp if name == "mlp" else module)

    def get_weight_dtype(self) -> torch.dtype:
        mlp: Any = self.mlp
        return mlp.experts.fc1_bias.dtype  # an adapted kernel would be summed up for its type


def _route(block: ResidualAttentionBlock, options: dict[str, Any]) -> RoutedTextBlock:
    dense: Any = block.mlp
    fc1, fc2 = dense.c_fc, dense.c_proj
    layer = CausalSoftMoE(fc1.in_features, hidden_dim=fc1.out_features, **options)
    with torch.no_grad():
        layer.experts.fc1_weight.copy_(fc1.weight.T)
        layer.experts.fc1_bias.copy_(fc1.bias)
        layer.experts.fc2_weight.copy_(fc2.weight.T)
        layer.experts.fc2_bias.copy_(fc2.bias)
    return RoutedTextBlock(block, layer)

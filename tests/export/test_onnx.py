"""ONNX exports: both towers, routed layers of every kind that differs, any batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from encoders.clip_model import build_clip, vision_config
from encoders.export import onnx_folder
from encoders.export.model import DualEncoder, ExportError
from encoders.export.onnx_folder import write_onnx, write_tower
from encoders.routers import ROUTERS, build_routed_layer
from encoders.text_towers import build_tokenizer, open_clip_text_config, route_text_blocks

TEST = "soft_moe_vit_test_patch16_64"
PREPROCESS = {
    "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
}  # fmt: skip


def encoder(arguments: dict[str, Any], routed_text: bool = False, **more: Any) -> DualEncoder:
    text = open_clip_text_config(16, 2, 2, 12)
    if routed_text:
        text = route_text_blocks(text, 1, 2)
    config = {"embed_dim": 8, "vision_cfg": vision_config(TEST, arguments), "text_cfg": text}
    config |= more
    torch.manual_seed(0)
    model: Any = build_clip(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return DualEncoder(model, config, PREPROCESS, 64, build_tokenizer(text))


def run(path: Path, inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: inputs.numpy()})
    return torch.from_numpy(np.asarray(found))


def test_both_towers_agree_with_the_model_for_any_batch(tmp_path: Path) -> None:
    model = encoder({}, routed_text=True, init_logit_bias=-3.0)
    write_onnx(model, tmp_path)
    images, texts = torch.randn(5, 3, 64, 64), model.tokenizer(["a", "b c", "d " * 30, "e", "f"])
    for size in (1, 2, 5):
        with torch.no_grad():
            image = model.model.encode_image(images[:size], normalize=True)
            text = model.model.encode_text(texts[:size], normalize=True)
        assert (run(tmp_path / "image.onnx", images[:size]) - image).abs().max() < 1e-4
        assert (run(tmp_path / "text.onnx", texts[:size]) - text).abs().max() < 1e-4
    config = json.loads((tmp_path / "onnx_config.json").read_text())
    assert config["logit_bias"] == pytest.approx(-3)
    assert config["logit_scale"] == pytest.approx(model.model.logit_scale.exp().item())
    assert (config["scores"], config["context_length"]) == ("sigmoid", 12)
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize("router", ["tokens_choice", "experts_choice"])
def test_sparse_routers_are_exported_image_by_image(tmp_path: Path, router: str) -> None:
    options = {"capacity_factor": 0.5} if router == "tokens_choice" else {"capacity_factor": 1.0}
    model = encoder({"router": router, "num_experts": 4, **options})
    write_tower(model.model.visual, torch.randn(2, 3, 64, 64), "pixel_values", "image_embeds",
                tmp_path / "image.onnx")  # fmt: skip
    images = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        alone = [model.model.encode_image(row[None], normalize=True) for row in images]
    assert (run(tmp_path / "image.onnx", images) - torch.cat(alone)).abs().max() < 1e-4


NEEDED: dict[str, dict[str, Any]] = {
    "identity": {"slots_per_expert": 4},  # for 16 tokens
    "hierarchical_mixture": {"num_groups": 2},
    "tokens_choice": {"top_k": 2, "group_size": 1},
    "token_mixture": {
        "router": "query", "weighting": "inputs_and_outputs", "residual_experts": True,
    },
}  # fmt: skip


class Stack(torch.nn.Module):
    """One layer of every router, one after the other: tokens (B, M, d) to (B, d)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            build_routed_layer(name, 8, 4, 16, tokens=16, **NEEDED.get(name, {}))
            for name in ROUTERS
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            tokens = tokens + layer(torch.nn.functional.layer_norm(tokens, (8,)))
        return tokens.mean(1)


def test_every_router_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stack = Stack().eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    write_tower(stack, torch.randn(2, 16, 8), "tokens", "embeds", tmp_path / "stack.onnx")
    for size in (1, 7):
        tokens = torch.randn(size, 16, 8)
        with torch.no_grad():
            expected = torch.nn.functional.normalize(stack(tokens), dim=-1)
        assert (run(tmp_path / "stack.onnx", tokens) - expected).abs().max() < 1e-4


def test_large_weights_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_folder, "LARGEST", 1000)
    torch.manual_seed(0)
    layer, folder = torch.nn.Linear(64, 32), tmp_path / "partial"
    folder.mkdir()
    write_tower(layer, torch.randn(2, 64), "a", "b", folder / "large.onnx")
    assert {path.name for path in folder.iterdir()} == {"large.onnx", "large.onnx.data"}
    folder = folder.rename(tmp_path / "final")
    with torch.no_grad():
        expected = torch.nn.functional.normalize(layer(torch.ones(3, 64)), dim=-1)
    assert (run(folder / "large.onnx", torch.ones(3, 64)) - expected).abs().max() < 1e-4


def test_a_tower_that_onnx_cannot_hold_is_refused(tmp_path: Path) -> None:
    class Bessel(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(images).mean((2, 3))

    with pytest.raises(ExportError, match=r"image.onnx cannot be made"):
        write_tower(Bessel(), torch.randn(2, 3, 8, 8), "a", "b", tmp_path / "image.onnx")

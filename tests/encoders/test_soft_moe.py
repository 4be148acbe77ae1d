"""Soft MoE layer against arrays computed by google-research/vmoe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.soft_moe import SoftMoE
from tests.encoders.reference import FLAX_EXPERTS, GOLDEN, Golden, assert_close

ROUTERS = sorted(path.stem for path in GOLDEN.glob("soft_router_*.npz"))
BLOCKS = sorted(path.stem for path in GOLDEN.glob("soft_block_*.npz"))
# Both sides sum in float32 in another order; the arrays agree with float64 to 1e-6 of their
# largest element, and gradients pass through the two softmaxes and the norms once more.
VALUE_TOLERANCE = 4e-6
GRADIENT_TOLERANCE = 1e-5
FLAX_NAMES = {
    "phi": "Router/mu",
    "scale": "Router/scale",
    **FLAX_EXPERTS,
}


class StandInExperts(nn.Module):
    """Records the slots it is given and answers with the outputs it holds, both (E, B*P, d)."""

    def __init__(self, outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs
        self.slots = torch.empty(0)

    def forward(self, slots: Tensor) -> Tensor:
        self.slots = slots
        return self.outputs


def by_expert(slots: Tensor) -> Tensor:
    """Reference layout (B, E, P, d) to the layout of the experts, (E, B*P, d)."""
    return slots.transpose(0, 1).flatten(1, 2)


def load_router(golden: Golden, prefix: str, monkeypatch: pytest.MonkeyPatch) -> SoftMoE:
    """A layer with the stored router parameters; the stored noise replaces the random one."""
    settings = golden.settings
    dim, experts, slots = golden[f"{prefix}mu"].shape
    layer = SoftMoE(
        dim, experts, slots, settings.get("mlp_dim"), noise_std=settings["noise_std"]
    ).train(not settings["deterministic"])
    with torch.no_grad():
        layer.phi.copy_(golden[f"{prefix}mu"])
        layer.scale.copy_(golden[f"{prefix}scale"])
    if settings["noise_std"] > 0:
        noise = golden["in/noise"].flatten(2)
        monkeypatch.setattr(torch, "randn_like", lambda logits: noise.expand_as(logits))
    return layer


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_weights_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(name)
    layer = load_router(golden, "params/", monkeypatch)
    x = golden.leaf("in/x")
    logits, dispatch, combine = layer.route(x)
    assert_close(logits, golden["out/logits"].flatten(2), VALUE_TOLERANCE)
    assert_close(dispatch, golden["out/dispatch_weights"].flatten(2), VALUE_TOLERANCE)
    assert_close(combine, golden["out/combine_weights"].flatten(2), VALUE_TOLERANCE)

    loss = (dispatch * golden["w/dispatch"].flatten(2)).sum()
    loss = loss + (combine * golden["w/combine"].flatten(2)).sum()
    loss.backward()
    assert_close(x.grad, golden["grad_weights/in/x"], GRADIENT_TOLERANCE)
    assert_close(layer.phi.grad, golden["grad_weights/params/mu"], GRADIENT_TOLERANCE)
    assert_close(layer.scale.grad, golden["grad_weights/params/scale"], GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", ROUTERS)
def test_slots_and_mixture_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(name)
    layer = load_router(golden, "params/", monkeypatch)
    x, y = golden.leaf("in/x"), golden.leaf("in/y")
    dim = x.shape[-1]
    # The stored expert outputs are one feature wider than the tokens: two passes cover them.
    passes = []
    for outputs in (y[..., :dim], F.pad(y[..., dim:], (0, dim - 1))):
        experts = StandInExperts(by_expert(outputs))
        layer.experts = experts
        passes.append(layer(x))
    combined = torch.cat((passes[0], passes[1][..., :1]), dim=-1)
    assert_close(experts.slots, by_expert(golden["f32/slots"]), VALUE_TOLERANCE)
    assert_close(combined, golden["f32/combined"], VALUE_TOLERANCE)

    loss = (experts.slots * by_expert(golden["w/slots"])).sum()
    loss = loss + (combined * golden["w/combined"]).sum()
    assert_close(loss, golden["f32/loss"], VALUE_TOLERANCE)
    loss.backward()
    assert_close(x.grad, golden["f32/grad/in/x"], GRADIENT_TOLERANCE)
    assert_close(y.grad, golden["f32/grad/in/y"], GRADIENT_TOLERANCE)
    assert_close(layer.phi.grad, golden["f32/grad/params/mu"], GRADIENT_TOLERANCE)
    assert_close(layer.scale.grad, golden["f32/grad/params/scale"], GRADIENT_TOLERANCE)


def load_block(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> SoftMoE:
    layer = load_router(golden, "params/Router/", monkeypatch)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(golden[f"params/{FLAX_NAMES[name]}"])
    return layer


@pytest.mark.parametrize("name", BLOCKS)
def test_layer_equals_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = Golden(name)
    layer = load_block(golden, monkeypatch)
    x = golden.leaf("in/x")
    # The reference may route several images together; here that is a reshape.
    groups = x.reshape(-1, golden.settings["group_size"], x.shape[-1])
    weights = layer.route(groups)
    assert_close(weights.dispatch, golden["out/dispatch_weights"].flatten(2), VALUE_TOLERANCE)
    assert_close(weights.combine, golden["out/combine_weights"].flatten(2), VALUE_TOLERANCE)
    expert_out = layer.experts(by_expert(golden["f32/slots"]))
    assert_close(expert_out, by_expert(golden["f32/expert_out"]), VALUE_TOLERANCE)
    out = layer(groups).reshape(x.shape)
    assert_close(out, golden["f32/out"], VALUE_TOLERANCE)

    (out * golden["w/out"]).sum().backward()
    assert_close(x.grad, golden["f32/grad/in/x"], GRADIENT_TOLERANCE)
    for key, parameter in layer.named_parameters():
        expected = golden[f"f32/grad/params/{FLAX_NAMES[key]}"]
        assert_close(parameter.grad, expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_rounds_the_mixtures_but_not_the_routing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Golden(name)
    layer = load_block(golden, monkeypatch)
    groups = golden["in/x"].reshape(-1, golden.settings["group_size"], golden["in/x"].shape[-1])
    exact = layer.route(groups)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer.route(groups)
        out = layer(groups)
        half = layer.route(groups.bfloat16())
    for weights, expected in zip(under_autocast, exact, strict=True):
        assert weights.dtype == torch.float32
        assert torch.equal(weights, expected)
    assert half.dispatch.dtype == half.combine.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    # Eight bits of mantissa, through two mixtures and two matrix products.
    assert_close(out.float().reshape(golden["f32/out"].shape), golden["bf16/out"], 2e-2)

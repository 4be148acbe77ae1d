"""Fixed routing: each layer against its formula, and the limits of each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.experts import ExpertMLP
from encoders.fixed_routing import (
    FixedRouting,
    IdentityRouting,
    SoftUniformRouting,
    UniformRouting,
    UniformSoftRouting,
)
from encoders.soft_moe import SoftMoE

LAYERS = [IdentityRouting, UniformRouting, SoftUniformRouting, UniformSoftRouting]
EXPERTS, SLOTS = 3, 2


def mixture(bank: ExpertMLP, x: Tensor, dispatch: Tensor, combine: Tensor) -> Tensor:
    """Soft MoE with given weights (B, M, E * P), one line per step."""
    slots = torch.einsum("bms,bmd->bsd", dispatch, x).unflatten(1, (EXPERTS, -1))
    hidden = torch.einsum("bepd,edh->beph", slots, bank.fc1_weight) + bank.fc1_bias[:, None]
    hidden = F.gelu(hidden, approximate="tanh")
    outputs = torch.einsum("beph,ehd->bepd", hidden, bank.fc2_weight) + bank.fc2_bias[:, None]
    return torch.einsum("bms,bsd->bmd", combine, outputs.flatten(1, 2))


@pytest.mark.parametrize("kind", LAYERS)
def test_float64_equals_the_formula_with_every_gradient(
    kind: type[FixedRouting] | type[SoftMoE],
) -> None:
    torch.manual_seed(0)
    layer = kind(8, EXPERTS, SLOTS, 5, identical_experts=False, dtype=torch.float64)
    tokens = EXPERTS * SLOTS if kind is IdentityRouting else 7
    x = torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True)
    uniform = torch.ones(2, tokens, EXPERTS * SLOTS, dtype=torch.float64)
    dispatch, combine = uniform / tokens, uniform / (EXPERTS * SLOTS)
    if kind is IdentityRouting:
        dispatch = combine = torch.eye(tokens, dtype=torch.float64).expand(2, -1, -1)
    if isinstance(layer, SoftMoE):
        learned = SoftMoE.route(layer, x)
        if kind is SoftUniformRouting:
            dispatch = learned.dispatch
        else:
            combine = learned.combine
    out, expected = layer(x), mixture(layer.experts, x, dispatch, combine)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves, weight = [x, *layer.parameters()], torch.randn_like(x)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    for gradient, other in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        assert gradient.any()
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-12)


def test_identity_wants_as_many_slots_as_tokens() -> None:
    for tokens in (7, 12):
        with pytest.raises(ValueError, match=rf"{tokens} tokens meet 3 experts x 2 .*= {tokens}"):
            IdentityRouting(8, 3, 2)(torch.randn(1, tokens, 8))


def test_identity_moves_nothing_between_tokens() -> None:
    x = torch.randn(2, 6, 8, requires_grad=True)
    IdentityRouting(8, 3, 2)(x)[1, 4].sum().backward()
    assert x.grad is not None
    assert x.grad.any(-1).nonzero().tolist() == [[1, 4]]


def test_only_uniform_routing_starts_with_independent_experts() -> None:
    for kind in LAYERS:
        weight = kind(8, 4).experts.fc1_weight
        assert torch.equal(weight[0], weight[1]) == (kind is not UniformRouting), kind
    assert torch.equal(*UniformRouting(8, 2, identical_experts=True).experts.fc1_weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_batch_mates_do_not_matter(kind: type[FixedRouting] | type[SoftMoE]) -> None:
    torch.manual_seed(0)
    layer, x = kind(8, 3, 2), torch.randn(4, 6, 8)
    alone = torch.cat([layer(image[None]) for image in x])
    torch.testing.assert_close(layer(x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [SoftUniformRouting, UniformSoftRouting])
def test_padding_does_not_matter(kind: type[SoftMoE]) -> None:
    torch.manual_seed(0)
    layer, x = kind(8, 3, 2), torch.randn(2, 4, 8)
    padded = torch.cat([x, torch.full((2, 3, 8), torch.nan)], dim=1)
    out = layer(padded, padded[..., 0].isnan())
    torch.testing.assert_close(out[:, :4], layer(x), rtol=1e-5, atol=1e-6)
    assert not out[:, 4:].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_every_layer_decays_only_expert_weights(kind: type[FixedRouting] | type[SoftMoE]) -> None:
    layer = kind(8, 2)
    decayed = set(dict(layer.named_parameters())) - layer.no_weight_decay()
    assert decayed == {"experts.fc1_weight", "experts.fc2_weight"}
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(torch.randn(1, 2, 8))
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", LAYERS)
def test_impossible_sizes_are_refused(kind: type[FixedRouting] | type[SoftMoE]) -> None:
    for name in ("num_experts", "slots_per_expert", "hidden_dim"):
        with pytest.raises(ValueError, match=name):
            kind(**{"dim": 8, "num_experts": 2, name: 0})

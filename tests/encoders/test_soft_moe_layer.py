"""Soft MoE layer: what it promises beyond the reference arrays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from encoders import experts as experts_module
from encoders.causal_soft_moe import CausalSoftMoE
from encoders.experts import ExpertMLP
from encoders.soft_moe import SoftMoE, slots_for_capacity
from tests.encoders.reference import OperatorCount, assert_close


class SlotRecorder(nn.Module):
    """In place of the experts: records the slots (E, B*P, d) and hands them on."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = torch.empty(0)

    def forward(self, slots: Tensor) -> Tensor:
        self.slots = slots
        return slots


def einsum_reference(layer: SoftMoE, x: Tensor) -> Tensor:
    """Paper, section 2.1 with the public normalisation, one line per step."""
    unit = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    phi = layer.phi / (layer.phi.square().sum(0, keepdim=True) + 1e-6).sqrt()
    logits = layer.scale * torch.einsum("bmd,dep->bmep", unit, phi)
    slots = torch.einsum("bmep,bmd->bepd", logits.softmax(1), x)
    bank = layer.experts
    hidden = torch.einsum("bepd,edh->beph", slots, bank.fc1_weight) + bank.fc1_bias[:, None]
    hidden = F.gelu(hidden, approximate="tanh")
    outputs = torch.einsum("beph,ehd->bepd", hidden, bank.fc2_weight) + bank.fc2_bias[:, None]
    return torch.einsum("bmep,bepd->bmd", logits.flatten(2).softmax(2).view_as(logits), outputs)


def test_float64_equals_the_einsum_form_with_every_gradient() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(8, 3, 2, 5, identical_experts=False, dtype=torch.float64)
    x = torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 8, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    out, expected = layer(x), einsum_reference(layer, x)
    assert_close(out, expected, 1e-13)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    for gradient, other in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        assert_close(gradient, other, 1e-12)


def test_token_length_changes_slots_but_not_logits() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(16, 4, 2)
    recorder = SlotRecorder()
    layer.experts = recorder
    x = torch.randn(2, 9, 16)
    layer(x)
    slots = recorder.slots
    layer(10 * x)
    # The epsilon in the root is the only trace of the length that the logits keep.
    assert_close(layer.route(10 * x).logits, layer.route(x).logits, 1e-6)
    assert_close(recorder.slots, 10 * slots, 2e-6)


def test_dispatch_sums_over_tokens_and_combine_over_slots() -> None:
    torch.manual_seed(0)
    _, dispatch, combine = SoftMoE(16, 4, 2).route(torch.randn(3, 9, 16))
    assert dispatch.shape == combine.shape == (3, 9, 8)
    torch.testing.assert_close(dispatch.sum(1), torch.ones(3, 8))
    torch.testing.assert_close(combine.sum(2), torch.ones(3, 9))


def test_batch_mates_do_not_matter() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(16, 4, 2, identical_experts=False)
    x = torch.randn(5, 9, 16)
    together = layer(x)
    alone = torch.cat([layer(image[None]) for image in x])
    assert_close(together, alone, 2e-6)
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(layer(x[order]), together[order], 2e-6)


def test_expert_order_does_not_matter() -> None:
    torch.manual_seed(0)
    layer, shuffled = SoftMoE(16, 4, 2, identical_experts=False), SoftMoE(16, 4, 2)
    order = torch.tensor([2, 0, 3, 1])
    state = {
        name: value if name == "scale" else value[:, order] if name == "phi" else value[order]
        for name, value in layer.state_dict().items()
    }
    shuffled.load_state_dict(state)
    x = torch.randn(2, 9, 16)
    assert_close(shuffled(x), layer(x), 2e-6)


def test_without_normalisation_the_length_counts() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(16, 4, normalize=False)
    x = torch.randn(2, 9, 16)
    assert_close(layer.route(x).logits, (x @ layer.phi.flatten(1)), 1e-6)
    assert_close(layer.route(3 * x).logits, 3 * layer.route(x).logits, 1e-6)


def test_noise_is_drawn_in_training_only() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(16, 4, noise_std=0.5)
    x = torch.randn(8, 50, 16)
    clean = layer.eval().route(x).logits
    assert torch.equal(clean, layer.route(x).logits)
    noise = layer.train().route(x).logits - clean
    assert noise.std().item() == pytest.approx(0.5, rel=0.1)


def test_experts_start_equal_unless_independent() -> None:
    torch.manual_seed(0)
    for parameter in SoftMoE(8, 4).experts.parameters():
        assert torch.equal(parameter, parameter[:1].expand_as(parameter))
        assert parameter.abs().max() > 0
    for parameter in SoftMoE(8, 4, identical_experts=False).experts.parameters():
        flat = parameter.flatten(1)
        assert torch.pdist(flat).min() > 0


def test_initialisers_have_the_reference_spread() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(64, 32, 2, 96, identical_experts=False)
    assert layer.scale.item() == 1.0
    assert layer.phi.std().item() == pytest.approx((64 * 32) ** -0.5, rel=0.05)
    assert layer.phi.abs().max() <= 2 * (64 * 32) ** -0.5 / 0.8796
    bound = (6 / (64 + 96)) ** 0.5  # Xavier with the fans of one expert
    for weight in (layer.experts.fc1_weight, layer.experts.fc2_weight):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert layer.experts.fc1_bias.std().item() == pytest.approx(1e-6, rel=0.1)


@pytest.mark.parametrize(
    ("dim", "dispatch_max", "combine_max"), [(384, 0.0059, 0.0089), (1280, 0.0055, 0.0083)]
)
def test_routing_starts_almost_uniform(dim: int, dispatch_max: float, combine_max: float) -> None:
    """Uniform would be 1/196 = .0051 and 1/128 = .0078."""
    torch.manual_seed(0)
    layer = SoftMoE(dim, 128, hidden_dim=1)
    with torch.no_grad():
        _, dispatch, combine = layer.route(torch.randn(4, 196, dim))
    assert dispatch.amax(1).mean().item() == pytest.approx(dispatch_max, abs=1e-4)
    assert combine.amax(2).mean().item() == pytest.approx(combine_max, abs=1e-4)


@pytest.mark.parametrize("batched", [False, True])
def test_operator_count_does_not_depend_on_the_number_of_experts(
    batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks it depends on the size of the hidden activations, which is one block here."""
    if batched:  # as on a GPU
        monkeypatch.setattr(experts_module, "can_run_blocked", lambda x, bank: False)

    def operators(num_experts: int) -> int:
        layer = SoftMoE(8, num_experts, 2, 4)
        x = torch.randn(2, 6, 8, requires_grad=True)
        with OperatorCount() as counter:
            layer(x).sum().backward()
        return counter.count

    assert 10 < operators(2) == operators(64)


def test_compiles_without_a_graph_break() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(8, 3, 2, 5, identical_experts=False, dtype=torch.float64)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    # Traces forward and backward; generating kernels would take a minute and test the compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (layer, compiled):
        layer.zero_grad()
        module(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for eager, traced in zip(*gradients, strict=True):
        assert_close(traced, eager, 1e-12)


def test_no_weight_decay_names_the_router_and_the_expert_biases() -> None:
    layer = SoftMoE(8, 2)
    decayed = set(dict(layer.named_parameters())) - layer.no_weight_decay()
    assert decayed == {"experts.fc1_weight", "experts.fc2_weight"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("slots_per_expert", 0), ("num_experts", 0), ("hidden_dim", 0), ("noise_std", -0.1)],
)
def test_impossible_settings_are_refused(name: str, value: float) -> None:
    settings: dict[str, Any] = {"dim": 8, "num_experts": 2, name: value}
    with pytest.raises(ValueError, match=name):
        SoftMoE(**settings)


def test_expert_rows_meet_their_own_expert_only() -> None:
    torch.manual_seed(0)
    bank = ExpertMLP(3, 4, 5, identical_init=False)
    x = torch.randn(3, 2, 4, requires_grad=True)
    bank(x)[1].sum().backward()
    assert x.grad is not None
    assert [bool(block.any()) for block in x.grad] == [False, True, False]
    for parameter in bank.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[[0, 2]].any()


def test_padding_has_no_influence() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(16, 4, 2, identical_experts=False, dtype=torch.float64)
    lengths = (9, 5, 1)
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor(lengths)[:, None]
    garbage = x.masked_fill(mask.unsqueeze(-1), torch.nan).requires_grad_()
    out = layer(garbage, mask)
    weight = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weight).sum(), [garbage, *layer.parameters()])

    alone = [x[i : i + 1, :length].clone().requires_grad_() for i, length in enumerate(lengths)]
    outs = [layer(image) for image in alone]
    loss = torch.stack(
        [(o[0] * w[: len(o[0])]).sum() for o, w in zip(outs, weight, strict=True)]
    ).sum()
    references = torch.autograd.grad(loss, [*alone, *layer.parameters()])
    for i, length in enumerate(lengths):
        assert_close(out[i, :length], outs[i][0], 1e-13)
        assert_close(gradients[0][i, :length], references[i][0], 1e-11)
    assert not out[mask].any()
    assert not gradients[0][mask].any()
    for gradient, reference in zip(gradients[1:], references[3:], strict=True):
        assert_close(gradient, reference, 1e-11)


def test_mask_leaves_combine_alone_and_survives_an_empty_image() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(16, 4, 2)
    x = torch.randn(2, 9, 16, requires_grad=True)
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0] = True
    mask[1, 4:] = True
    _, dispatch, combine = layer.route(x, mask)
    assert not dispatch[1, 4:].any()
    assert torch.equal(combine, layer.route(x).combine)
    out = layer(x, mask)
    assert not out[0].any()
    out.square().sum().backward()
    for leaf in (x, *layer.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "slots"),
    [(196, 128, 1.0, 2), (196, 32, 1.0, 6), (256, 256, 1.0, 1), (5, 2, 1.0, 2), (7, 2, 1.0, 4)],
)
def test_capacity_rounds_as_the_reference(
    tokens: int, experts: int, factor: float, slots: int
) -> None:
    assert slots_for_capacity(tokens, experts, factor) == slots


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((98, 196, 1.0), "capacity_factor 1.0 leaves 196 experts"),
        ((0, 2, 1.0), "tokens"),
        ((4, 0, 1.0), "experts"),
        ((4, 2, -1.0), "capacity_factor"),
    ],
)
def test_capacity_without_a_slot_is_refused(
    arguments: tuple[int, int, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        slots_for_capacity(*arguments)


def test_gradient_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(8, 3, 2, 5, identical_experts=False)
    x = torch.randn(2, 7, 8, requires_grad=True)
    leaves = [x, *layer.parameters()]
    plain = torch.autograd.grad(layer(x).square().sum(), leaves)
    out = checkpoint(layer, x, use_reentrant=False)
    assert isinstance(out, Tensor)
    for gradient, reference in zip(
        torch.autograd.grad(out.square().sum(), leaves), plain, strict=True
    ):
        assert torch.equal(gradient, reference)


@pytest.mark.parametrize("kind", [SoftMoE, CausalSoftMoE])
@pytest.mark.parametrize("mask", [torch.zeros(2, 6, dtype=torch.bool), torch.zeros(2, 7)])
def test_masks_of_another_shape_or_type_are_refused(
    kind: type[SoftMoE] | type[CausalSoftMoE], mask: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match=r"padding_mask is .* need torch.bool \(2, 7\)"):
        kind(8, 2)(torch.randn(2, 7, 8), mask)

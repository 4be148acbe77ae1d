"""Causal Soft MoE: equal to a softmax per prefix, at any scale, and blind to what comes later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from encoders import causal_soft_moe
from encoders.causal_soft_moe import CausalSoftMoE
from encoders.soft_moe import SoftMoE

DIM, LENGTH = 8, 13
every_block_size = pytest.mark.parametrize("block_size", [1, 3, LENGTH + 1])


@pytest.fixture(params=[4, 128], ids=["chunks of 4", "one chunk"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with several chunks and with one."""
    monkeypatch.setattr(causal_soft_moe, "CHUNK", request.param)


def make(block_size: int = 1, scale: float = 1.0, **options: Any) -> CausalSoftMoE:
    torch.manual_seed(0)
    defaults = {"identical_experts": False, "dtype": torch.float64}
    layer = CausalSoftMoE(DIM, 3, 2, 12, block_size=block_size, **defaults | options)
    with torch.no_grad():
        layer.scale.fill_(scale)
        layer.experts.fc1_bias.normal_()
    return layer


def sequences(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, DIM, dtype=torch.float64, generator=generator)


def run_experts(layer: CausalSoftMoE, slots: Tensor) -> Tensor:
    """Slots (B, S, d) through their experts."""
    rows = slots.unflatten(1, (3, 2)).transpose(0, 1).reshape(3, -1, DIM)
    return layer.experts(rows).view(3, -1, 2, DIM).transpose(0, 1).reshape(slots.shape)


def prefix_reference(layer: CausalSoftMoE, x: Tensor) -> Tensor:
    """One softmax per position over its own prefix."""
    phi = layer.phi.flatten(1)
    unit = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    logits = layer.scale * unit @ (phi / (phi.square().sum(0) + 1e-6).sqrt())
    outputs = []
    for t in range(x.shape[1]):
        end = t // layer.block_size * layer.block_size + 1
        dispatch = logits[:, :end].softmax(1)
        slots = run_experts(layer, dispatch.transpose(1, 2) @ x[:, :end])
        outputs.append(torch.einsum("bs,bsd->bd", logits[:, t].softmax(-1), slots))
    return torch.stack(outputs, 1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def decode(layer: CausalSoftMoE, x: Tensor) -> Tensor:
    state, outputs = layer.initial_state(x), []
    for position in x.split(1, 1):
        y, state = layer.step(position, state)
        outputs.append(y)
    return torch.cat(outputs, 1)


@every_block_size
@pytest.mark.parametrize("scale", [1.0, 10.0, 60.0, -200.0, 200.0])
def test_equals_a_softmax_per_prefix_with_every_gradient(block_size: int, scale: float) -> None:
    layer, x = make(block_size, scale), sequences().requires_grad_()
    out, expected = layer(x), prefix_reference(layer, x)
    assert relative_error(out, expected) <= 1e-14
    leaves, weight = [x, *layer.parameters()], torch.randn_like(x)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    others = torch.autograd.grad((expected * weight).sum(), leaves)
    for gradient, other in zip(gradients, others, strict=True):
        assert relative_error(gradient, other) <= 1e-10


@every_block_size
@pytest.mark.parametrize(("scale", "bound"), [(10.0, 2e-6), (100.0, 2e-5), (200.0, 4e-5)])
def test_float32_error_follows_the_rounding_of_the_logits(
    block_size: int, scale: float, bound: float
) -> None:
    """A sum of exponentials that subtracts the bound |s| instead would underflow from 44 on."""
    layer, x = make(block_size, scale), sequences()
    expected = prefix_reference(layer, x)
    assert relative_error(layer.float()(x.float()).double(), expected) <= bound


@pytest.mark.parametrize("scale", [1e4, -1e30])
def test_any_scale_is_finite(scale: float) -> None:
    layer, x = make(scale=scale).float(), sequences().float().requires_grad_()
    out = layer(x)
    out.sum().backward()
    assert x.grad is not None
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@every_block_size
def test_a_later_token_changes_nothing_before_it(block_size: int) -> None:
    layer, x = make(block_size, 10.0).float(), sequences().float()
    before = layer(x)
    for t in range(LENGTH):
        changed = x.clone()
        changed[:, t] = 5 * torch.randn(2, DIM)
        after = layer(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])
        if block_size == 1:
            assert not torch.allclose(after[:, -1], before[:, -1])


@every_block_size
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_decoding_equals_the_whole_sequence(block_size: int, scale: float) -> None:
    layer, x = make(block_size, scale), sequences()
    assert relative_error(decode(layer, x), layer(x)) <= 1e-14
    single = layer.float()
    assert relative_error(decode(single, x.float()), single(x.float())) <= 1e-4


def test_long_decoding_in_bfloat16_does_not_drift() -> None:
    layer, x = make().bfloat16(), sequences(400).bfloat16()
    state = layer.initial_state(x)
    for position in x.split(1, 1):
        y, state = layer.step(position, state)
    assert y.dtype == torch.bfloat16
    dispatch = layer.logits(x).softmax(1)
    assert relative_error(state.mean, dispatch.transpose(1, 2) @ x.float()) <= 1e-5
    assert relative_error(y, layer(x)[:, -1:]) <= 0.02


def test_the_last_position_is_soft_moe() -> None:
    layer, x = make(), sequences()
    plain = SoftMoE(DIM, 3, 2, 12, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    assert relative_error(layer(x)[:, -1], plain(x)[:, -1]) <= 1e-14


@every_block_size
@pytest.mark.parametrize("padding", ["behind", "in front", "between"])
def test_padding_is_not_seen(block_size: int, padding: str) -> None:
    """Valid positions give what they give among other padding; in the exact form, without any."""
    layer, x = make(block_size, 5.0), sequences()
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    hidden = {"behind": slice(9, None), "in front": slice(0, 5), "between": slice(4, 9)}[padding]
    mask[0, hidden] = True
    out = layer(x, mask)
    assert torch.equal(out[0, hidden], torch.zeros_like(out[0, hidden]))
    other = x.clone()
    for content in (100.0, torch.inf, torch.nan):
        other[0, hidden] = content
        assert torch.equal(layer(other, mask), out)
    torch.testing.assert_close(out[1], layer(x)[1], rtol=1e-12, atol=1e-14)
    if block_size == 1:
        alone = layer(x[:1, ~mask[0]])
        torch.testing.assert_close(out[:1, ~mask[0]], alone, rtol=1e-12, atol=1e-14)


@every_block_size
def test_padding_in_front_opens_no_view_ahead(block_size: int) -> None:
    """A block that starts in padding has slots without any position: they must not borrow later
    ones."""
    layer, x = make(block_size, 5.0), sequences()
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[:, :5] = True
    before = layer(x, mask)
    changed = x.clone()
    changed[:, 6:] += 1
    assert torch.equal(layer(changed, mask)[:, :6], before[:, :6])


def test_nothing_but_padding_is_finite() -> None:
    layer, x = make(), sequences().requires_grad_()
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    out = layer(x, mask)
    assert not out.any()
    out.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@every_block_size
def test_an_empty_sequence_stays_empty(block_size: int) -> None:
    layer, x = make(block_size), sequences(0).requires_grad_()
    for mask in (None, torch.zeros(2, 0, dtype=torch.bool)):
        out = layer(x, mask)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        out.sum().backward()


@pytest.mark.parametrize(("block_size", "ratio"), [(1, 6.0), (3, 2.0)])
def test_cost_is_that_of_the_expert_calls(block_size: int, ratio: float) -> None:
    layer, seen = make(block_size, dtype=torch.float32), []
    assert layer.expert_flops_ratio() == ratio
    layer.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    layer(torch.randn(2, 12, DIM))
    rows = sum(experts * count for experts, count, _ in seen)
    with FlopCounterMode(display=False) as counter:
        Mlp(DIM, 12)(torch.randn(2, 12, DIM))
    dense = counter.get_total_flops()
    assert rows * dense / (2 * 12) == ratio * dense


def test_autocast_keeps_the_routing_in_float32() -> None:
    layer, x = make(dtype=torch.float32, scale=20.0), sequences().float()
    expected, logits = layer(x), layer.logits(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.logits(x), logits)
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert relative_error(out.float(), expected) < 0.03


def test_gradient_checkpointing_changes_nothing() -> None:
    layer, x = make(), sequences().requires_grad_()
    gradients = []
    for out in (layer(x), checkpoint(layer, x, use_reentrant=False)):
        gradients.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    for plain, repeated in zip(*gradients, strict=True):
        assert torch.equal(plain, repeated)


def test_compiles_without_a_graph_break() -> None:
    layer, x = make(3), sequences(6)
    compiled: nn.Module = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) <= 1e-14


def test_parameters_are_soft_moes() -> None:
    torch.manual_seed(0)
    causal = CausalSoftMoE(DIM, 3, 2)
    torch.manual_seed(0)
    plain = SoftMoE(DIM, 3, 2)
    assert causal.no_weight_decay() == plain.no_weight_decay()
    for name, value in plain.state_dict().items():
        assert torch.equal(causal.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["num_experts", "slots_per_expert", "hidden_dim", "block_size"])
def test_impossible_settings_are_refused(name: str) -> None:
    settings: dict[str, Any] = {"dim": DIM, "num_experts": 2, name: 0}
    with pytest.raises(ValueError, match=name):
        CausalSoftMoE(**settings)

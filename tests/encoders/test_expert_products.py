"""The CPU's blocked form of the expert bank against the batched one."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from encoders import expert_products
from encoders.expert_products import ReusedMemory, batched_expert_mlp
from encoders.experts import ExpertMLP


def bank_and_rows(experts: int = 5) -> tuple[ExpertMLP, Tensor]:
    torch.manual_seed(0)
    bank = ExpertMLP(experts, 4, 6, identical_init=False, dtype=torch.float64)
    with torch.no_grad():
        for bias in (bank.fc1_bias, bank.fc2_bias):
            bias.normal_()
    return bank, torch.randn(experts, 3, 4, dtype=torch.float64) * 3


def two_experts_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_products, "BLOCK_BYTES", 2 * 3 * 6 * 8)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_equal_the_batched_form(
    strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_experts_per_block(monkeypatch)  # the last block is smaller
    bank, x = bank_and_rows()
    if strided:  # as for one slot per expert, where (B, E, d) is only transposed
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    x.requires_grad_()
    weight = torch.randn_like(x)
    leaves = [x, *bank.parameters()]
    out, expected = bank(x), batched_expert_mlp(x, *bank.parameters())
    assert out.grad_fn is not None
    assert "BlockedExperts" in out.grad_fn.name()
    assert_near(out, expected)
    with torch.no_grad():
        assert_near(bank(x), expected)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    references = torch.autograd.grad((expected * weight).sum(), leaves)
    for gradient, reference in zip(gradients, references, strict=True):
        assert_near(gradient, reference)


def test_only_the_gradients_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    two_experts_per_block(monkeypatch)
    bank, x = bank_and_rows()
    full = torch.autograd.grad(bank(x).square().sum(), list(bank.parameters()))
    for chosen, (name, parameter) in enumerate(bank.named_parameters()):
        bank.requires_grad_(False)
        parameter.requires_grad_()
        bank.zero_grad()
        bank(x).square().sum().backward()
        for other, value in bank.named_parameters():
            assert (value.grad is not None) == (other == name)
        assert parameter.grad is not None
        assert_near(parameter.grad, full[chosen])


def test_extreme_activations_stay_finite() -> None:
    bank, x = bank_and_rows()
    for size in (0.0, 1e4, 1e15):
        rows = (x.float() * size).requires_grad_()
        bank.float()(rows).sum().backward()
        assert rows.grad is not None
        assert rows.grad.isfinite().all()
        for parameter in bank.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()


def test_memory_is_used_again_but_never_under_a_living_gradient() -> None:
    bank, x = bank_and_rows()

    def weight_gradient() -> Tensor:
        bank(x).square().sum().backward()
        assert bank.fc1_weight.grad is not None
        return bank.fc1_weight.grad

    address = weight_gradient().data_ptr()
    bank.zero_grad()
    kept = weight_gradient()
    assert kept.data_ptr() == address
    once = kept.clone()
    bank.zero_grad()  # `kept` still holds the memory
    assert weight_gradient().data_ptr() != address
    assert torch.equal(kept, once)


def test_gradients_accumulate() -> None:
    bank, x = bank_and_rows()
    for _ in range(3):
        bank(x).square().sum().backward()
    summed = [parameter.grad for parameter in bank.parameters()]
    bank.zero_grad()
    bank(x).square().sum().backward()
    for total, parameter in zip(summed, bank.parameters(), strict=True):
        assert total is not None
        assert parameter.grad is not None
        assert_near(total, 3 * parameter.grad)


def test_copies_and_pickles_start_without_memory() -> None:
    bank, x = bank_and_rows()
    bank(x).sum().backward()
    memory = bank._gradient_memory[0]
    assert memory._memory.nbytes == bank.fc1_weight.nbytes
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert twin._gradient_memory[0]._memory.nbytes == 0
        assert torch.equal(twin(x), bank(x))


def test_memory_follows_the_size() -> None:
    memory = ReusedMemory()
    for shape in ((2, 3), (4, 5), (4, 5)):
        like = torch.empty(shape)
        tensor = memory.empty_like(like)
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        assert tensor.data_ptr() % 64 == 0
        del tensor


def test_second_derivatives() -> None:
    bank, x = bank_and_rows()
    x.requires_grad_()
    leaves = [x, *bank.parameters()]
    found = []
    for out in (bank(x), batched_expert_mlp(x, *bank.parameters())):
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), leaves))
    for second, reference in zip(*found, strict=True):
        assert_near(second, reference)


@pytest.mark.parametrize("reason", ["autocast", "bfloat16", "dropout", "meta"])
def test_batched_form_where_blocks_do_not_apply(reason: str) -> None:
    bank, x = bank_and_rows()
    bank, x = bank.float(), x.float()
    if reason == "bfloat16":
        bank, x = bank.bfloat16(), x.bfloat16()
    if reason == "dropout":
        bank.dropout.p = 0.5
    if reason == "meta":
        bank, x = bank.to("meta"), x.to("meta")
    with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        out = bank(x)
    assert out.grad_fn is not None
    assert "BlockedExperts" not in out.grad_fn.name()

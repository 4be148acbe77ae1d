"""The CPU's blocked form of the expert bank against the batched one."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

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


def test_one_bank_twice_in_a_graph() -> None:
    bank, x = bank_and_rows()
    x.requires_grad_()
    leaves = [x, *bank.parameters()]
    found = []
    for run in (bank, lambda rows: batched_expert_mlp(rows, *bank.parameters())):
        first = torch.autograd.grad(run(run(x)).square().sum(), leaves, create_graph=True)
        total = torch.stack([gradient.square().sum() for gradient in first]).sum()
        found.append([*first, *torch.autograd.grad(total, leaves)])
    for derivative, reference in zip(*found, strict=True):
        torch.testing.assert_close(derivative, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("blocked", [True, False])
def test_rows_for_another_number_of_experts_are_refused(blocked: bool) -> None:
    bank, x = bank_and_rows()
    bank.dropout.p = 0.0 if blocked else 0.5
    for rows in (x[:4], x[:1], torch.cat([x, x])):
        with pytest.raises(ValueError, match=r"one block of rows for each of 5 experts"):
            bank(rows)


def test_function_transforms_and_forward_mode() -> None:
    bank, x = bank_and_rows()
    state = {name: value.detach() for name, value in bank.named_parameters()}
    tangent = torch.randn_like(x)

    def run(rows: Tensor) -> Tensor:
        return torch.func.functional_call(bank, state, (rows,))

    expected, direction = torch.func.jvp(
        lambda rows: batched_expert_mlp(rows, *state.values()), (x,), (tangent,)
    )
    for result in torch.func.vmap(run)(x.expand(2, *x.shape)):
        assert_near(result, expected)
    assert_near(torch.func.jvp(run, (x,), (tangent,))[1], direction)
    with torch.no_grad(), forward_ad.dual_level():
        for result in (
            run(forward_ad.make_dual(x, tangent)),
            bank(forward_ad.make_dual(x, tangent)),
        ):
            assert_near(forward_ad.unpack_dual(result).tangent, direction)
    (gradient,) = torch.autograd.grad(bank(x.requires_grad_()).square().sum(), x)
    assert_near(torch.func.grad(lambda rows: run(rows).square().sum())(x), gradient)


def test_a_tangent_of_the_bank_alone() -> None:
    bank, x = bank_and_rows()
    tangents = [torch.randn_like(value) for value in bank.parameters()]
    _, expected = torch.func.jvp(
        lambda *weights: batched_expert_mlp(x, *weights), tuple(bank.parameters()), tuple(tangents)
    )
    with forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(value, tangent)
            for (name, value), tangent in zip(bank.named_parameters(), tangents, strict=True)
        }
        out = torch.func.functional_call(bank, duals, (x,))
        assert_near(forward_ad.unpack_dual(out).tangent, expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_batches_of_gradients(create_graph: bool) -> None:
    bank, x = bank_and_rows()
    out = bank(x.requires_grad_())
    leaves, directions = [x, *bank.parameters()], torch.randn(3, *out.shape, dtype=out.dtype)
    together = torch.autograd.grad(
        out, leaves, directions, is_grads_batched=True, retain_graph=True, create_graph=create_graph
    )
    assert together[0].requires_grad == create_graph
    for index, direction in enumerate(directions):
        alone = torch.autograd.grad(out, leaves, direction, retain_graph=True)
        for batched, single in zip(together, alone, strict=True):
            assert_near(batched[index], single)


def test_subclasses_in_the_bank_take_the_batched_form() -> None:
    class Weight(Tensor):
        pass

    bank, x = bank_and_rows()
    bank.fc2_weight = torch.nn.Parameter(bank.fc2_weight.detach().as_subclass(Weight))
    out = bank(x)
    assert out.grad_fn is not None
    assert "BlockedExperts" not in out.grad_fn.name()


def test_two_threads_never_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both look whether the memory is free before either has marked it, if they can."""
    memory, like, found = ReusedMemory(), torch.empty(8), []
    together = threading.Barrier(2)

    def slow_mark(view: Any) -> weakref.ref[Any]:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(0.1)
        return weakref.ref(view)

    monkeypatch.setattr(expert_products, "weakref", SimpleNamespace(ref=slow_mark))
    threads = [threading.Thread(target=lambda: found.append(memory.empty_like(like))) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].data_ptr() != found[1].data_ptr()


def test_memory_is_kept_for_leaf_weights_only() -> None:
    bank, x = bank_and_rows()
    parametrize.register_parametrization(bank, "fc1_weight", torch.nn.Tanh())
    bank(x).square().sum().backward()
    assert [memory._memory.nbytes for memory in bank._gradient_memory] == [
        0,
        bank.fc2_weight.nbytes,
    ]
    gradient = bank.parametrizations["fc1_weight"].original.grad
    bank.zero_grad()
    rest = (bank.fc1_bias, bank.fc2_weight, bank.fc2_bias)
    batched_expert_mlp(x, bank.fc1_weight, *rest).square().sum().backward()
    assert_near(gradient, bank.parametrizations["fc1_weight"].original.grad)

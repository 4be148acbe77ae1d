"""Sparse MoE layers: what they promise beyond the reference arrays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from encoders.auxiliary_losses import z_loss
from encoders.sparse_base import SparseMoE
from encoders.sparse_moe import ExpertsChoice, TokensChoice
from tests.encoders.reference import OperatorCount, assert_close

BOTH = pytest.mark.parametrize("kind", [TokensChoice, ExpertsChoice])


def one_by_one(layer: SparseMoE, x: Tensor) -> Tensor:
    """Every kept assignment on its own, for groups of one image."""
    routing, bank = layer.route(x), layer.experts
    rows = [torch.zeros_like(row) for row in x.flatten(0, 1)]
    for group, expert, column in routing.filled.nonzero().tolist():
        token = group * x.shape[1] + int(routing.token[group, expert, column])
        hidden = x.flatten(0, 1)[token] @ bank.fc1_weight[expert] + bank.fc1_bias[expert]
        hidden = F.gelu(hidden, approximate="tanh")
        output = hidden @ bank.fc2_weight[expert] + bank.fc2_bias[expert]
        gate = routing.gates.flatten(0, 1)[token, expert]
        rows[token] = rows[token] + gate * output
    return torch.stack(rows).view_as(x)


@BOTH
def test_float64_equals_the_loop_with_every_gradient(kind: type[SparseMoE]) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"top_k": 2} if kind is TokensChoice else {}
    layer = kind(
        8, 3, 5, group_size=1, capacity_factor=0.7, capacity_multiple=1, identical_experts=False,
        dtype=torch.float64, **options,
    ).eval()  # fmt: skip
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 9, 8, dtype=torch.float64)
    out, expected = layer(x), one_by_one(layer, x)
    leaves = [x, *layer.parameters()]
    assert_close(out, expected, 1e-13)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    for gradient, other in zip(
        gradients, torch.autograd.grad((expected * weight).sum(), leaves), strict=True
    ):
        assert_close(gradient, other, 1e-12)


def depends_on_mates(layer: SparseMoE) -> bool:
    """Whether the image before it in the batch changes what becomes of an image.

    The one before, for without batch priority the first image of a group is never disturbed.
    """
    torch.manual_seed(0)
    images = torch.randn(7, 8, 16)
    layer.eval()
    answers = torch.stack([layer(images[[mate, 0]])[1] for mate in range(1, 7)])
    return not torch.allclose(answers, answers[:1].expand_as(answers), atol=1e-6)


def test_a_shared_group_couples_images_and_groups_of_one_do_not() -> None:
    torch.manual_seed(1)
    for batch_priority in (False, True):
        options: dict[str, Any] = {"capacity_multiple": 1, "batch_priority": batch_priority}
        assert depends_on_mates(TokensChoice(16, 4, group_size=2, **options)), batch_priority
        assert not depends_on_mates(TokensChoice(16, 4, group_size=1, **options))
    assert depends_on_mates(ExpertsChoice(16, 4, group_size=2))
    assert not depends_on_mates(ExpertsChoice(16, 4))


def test_dropped_tokens_come_out_as_zero_and_the_earlier_or_surer_stay() -> None:
    # One expert takes everything; the gate grows with the first feature.
    x = torch.ones(1, 4, 2)
    x[0, :, 0] = torch.tensor([1.0, 3.0, 2.0, 4.0])
    for batch_priority, kept in ((False, [0, 1]), (True, [1, 3])):
        layer = TokensChoice(
            2, 2, capacity_factor=1, capacity_multiple=1, group_size=1,
            batch_priority=batch_priority,
        ).eval()  # fmt: skip
        with torch.no_grad():
            layer.router.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        assert layer(x)[0].any(1).nonzero().flatten().tolist() == kept
        scalars = {k: v.item() for k, v in layer.routing_scalars(layer.route(x)).items()}
        assert scalars == {
            "dropped_assignments": 0.5,
            "unserved_tokens": 0.5,
            "expert_load_max": 2.0,
            "expert_load_cv": 1.0,
        }


@BOTH
def test_noise_is_drawn_in_training_only_and_divided_by_the_experts(kind: type[SparseMoE]) -> None:
    torch.manual_seed(0)
    layer = kind(16, 4, noise_std=0.8, group_size=1)
    x = torch.randn(8, 50, 16)
    quiet = layer.eval().route(x)
    assert torch.equal(quiet.clean_logits, quiet.logits)
    noisy = layer.train().route(x)
    assert torch.equal(noisy.clean_logits, quiet.logits)
    noise = noisy.logits - noisy.clean_logits
    assert noise.std().item() == pytest.approx(0.2, rel=0.1)
    assert torch.equal(noisy.gates, noisy.logits.softmax(-1))


def test_auxiliary_terms_follow_weights_mode_and_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 6, 8)
    layer = TokensChoice(8, 4, group_size=1, loss_weights={"gshard": 0.1, "z": 0.25})
    layer(x)
    assert set(layer.auxiliary_losses) == {"importance", "load", "gshard", "z"}
    expected = 0.25 * z_loss((x @ layer.router).detach())
    torch.testing.assert_close(layer.auxiliary_losses["z"].detach(), expected)
    layer.eval()(x)
    assert layer.auxiliary_losses == {}
    without_noise = TokensChoice(8, 4, group_size=1, noise_std=0)
    without_noise(x)
    assert set(without_noise.auxiliary_losses) == {"importance"}
    experts = ExpertsChoice(8, 4)
    experts(x)
    assert experts.auxiliary_losses == {}


def test_copies_and_pickles_after_a_training_step_leave_the_terms_behind() -> None:
    layer, x = TokensChoice(8, 4, group_size=1), torch.randn(1, 6, 8)
    layer(x)
    terms = layer.auxiliary_losses
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.auxiliary_losses == {}
        assert torch.equal(twin.eval()(x), layer.eval()(x))
        layer.train().auxiliary_losses = terms
    assert set(layer.auxiliary_losses) == {"importance", "load"}


def test_z_loss_is_the_mean_squared_normaliser() -> None:
    logits = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    log2 = torch.tensor(2.0).log()
    torch.testing.assert_close(z_loss(logits), (log2**2 + (1 + log2) ** 2) / 2)


def test_batches_that_no_group_divides() -> None:
    layer = TokensChoice(8, 2, group_size=4)
    x = torch.randn(6, 3, 8)
    with pytest.raises(
        ValueError, match=r"batch of 6 images is no multiple of group_size=4.* 2 or"
    ):
        layer(x)
    routing = layer.eval().route(x)
    assert routing.gates.shape == (3, 6, 2)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize(
    ("layer", "tokens", "capacity"),
    [
        (TokensChoice(2, 128, capacity_factor=1.05), 1568, 16),  # 12.9 -> 13 -> 16
        (TokensChoice(2, 128, top_k=2, capacity_multiple=1), 1568, 25),  # 24.5
        (ExpertsChoice(2, 128), 196, 2),  # 1.53
        (ExpertsChoice(2, 8, capacity_multiple=4), 196, 24),  # 24.5, halves to even
        (ExpertsChoice(2, 2, capacity_factor=4), 5, 5),  # no expert can take more than all
    ],
)
def test_capacity(layer: SparseMoE, tokens: int, capacity: int) -> None:
    assert layer.capacity(tokens) == capacity
    token, filled = layer.assign(torch.rand(1, tokens, layer.router.shape[1]), capacity)
    assert token.shape == filled.shape == (1, layer.router.shape[1], capacity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_take_the_largest_gates_of_any_precision(dtype: torch.dtype) -> None:
    """Steps of one unit in the last place decide, and of equal gates the earliest token wins."""
    step = torch.finfo(dtype).eps / 2  # of numbers from 0.5 to 1
    gates = 0.5 + step * torch.tensor([1, 3, 0, 3, 2], dtype=dtype)
    token, filled = ExpertsChoice(2, 1, capacity_factor=2).assign(gates.view(1, 5, 1), 4)
    assert token.flatten().tolist() == [1, 3, 4, 0]
    assert filled.all()


@pytest.mark.filterwarnings("ignore:.*jit.*deprecated", "ignore::torch.jit.TracerWarning")
@BOTH
def test_traces(kind: type[SparseMoE]) -> None:
    layer, x = kind(8, 4, group_size=1).eval(), torch.randn(2, 8, 8)
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert_close(traced(x), layer(x), 1e-6)


def test_a_capacity_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"16 experts no row for groups of 4 tokens: use at least"):
        ExpertsChoice(8, 16)(torch.randn(1, 4, 8))


@BOTH
def test_operator_count_does_not_depend_on_the_number_of_experts(kind: type[SparseMoE]) -> None:
    def operators(num_experts: int) -> int:
        layer = kind(8, num_experts, 4, group_size=1)
        x = torch.randn(2, 64, 8, requires_grad=True)
        with OperatorCount() as counter:
            out = layer(x).sum()
            torch.stack([out, *layer.auxiliary_losses.values()]).sum().backward()
        return counter.count

    assert 10 < operators(2) == operators(64)


@BOTH
def test_compiles_without_a_graph_break(kind: type[SparseMoE]) -> None:
    torch.manual_seed(0)
    layer = kind(8, 3, 5, group_size=1, noise_std=0, identical_experts=False)
    x = torch.randn(2, 7, 8)
    # Traces forward and backward; generating kernels would take a minute and test the compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (layer, compiled):
        layer.zero_grad()
        loss = module(x).square().sum()
        torch.stack([loss, *layer.auxiliary_losses.values()]).sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for eager, traced in zip(*gradients, strict=True):
        assert_close(traced, eager, 1e-6)


@BOTH
def test_checkpointing_gives_the_same_gradients(kind: type[SparseMoE]) -> None:
    layer = kind(8, 3, 5, group_size=1)
    x = torch.randn(2, 7, 8)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@BOTH
def test_autocast_leaves_the_router_alone(kind: type[SparseMoE]) -> None:
    torch.manual_seed(0)
    layer = kind(8, 3, 5, group_size=1).eval()
    x = torch.randn(2, 7, 8)
    exact = layer.route(x)
    layer.train()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        layer.eval()
        for actual, expected in zip(layer.route(x), exact, strict=True):
            assert torch.equal(actual, expected)
        assert layer.route(x.bfloat16()).gates.dtype == torch.float32
    assert out.dtype == torch.bfloat16
    assert all(term.dtype == torch.float32 for term in layer.auxiliary_losses.values())


@BOTH
def test_initial_values_and_what_is_not_decayed(kind: type[SparseMoE]) -> None:
    torch.manual_seed(0)
    layer = kind(64, 128, 8)
    assert layer.router.std().item() == pytest.approx(1 / 8, rel=0.05)
    assert layer.router.abs().max() <= 2 / 8 / 0.8796
    assert torch.equal(layer.experts.fc1_weight[0], layer.experts.fc1_weight[-1])
    independent = kind(8, 4, 8, identical_experts=False).experts.fc1_weight
    assert not torch.equal(independent[0], independent[-1])
    decayed = set(dict(layer.named_parameters())) - layer.no_weight_decay()
    assert decayed == {"router", "experts.fc1_weight", "experts.fc2_weight"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", 0),
        ("top_k", 3),
        ("num_experts", 0),
        ("hidden_dim", 0),
        ("capacity_factor", 0.0),
        ("capacity_multiple", 0),
        ("group_size", 0),
        ("noise_std", -0.1),
        ("loss_weights", {"z": -1}),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"dim": 8, "num_experts": 2, name: value}
    with pytest.raises(ValueError, match=name):
        TokensChoice(**settings)

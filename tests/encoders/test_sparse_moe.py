"""Sparse MoE layers against arrays computed by google-research/vmoe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from encoders.auxiliary_losses import gshard_loss, importance_loss, load_loss
from encoders.sparse_base import SparseMoE, SparseRouting
from encoders.sparse_moe import ExpertsChoice, TokensChoice
from tests.encoders.reference import FLAX_EXPERTS, GOLDEN, Golden, assert_close

FILES = {
    family: sorted(
        path.stem
        for path in GOLDEN.glob(f"{family}_choice_*.npz")
        if not path.stem.endswith("_shared")
    )
    for family in ("tokens", "experts")
}
ALL = [*FILES["tokens"], *FILES["experts"]]
# Both sides sum in float32 in another order.
VALUE_TOLERANCE = 4e-6
GRADIENT_TOLERANCE = 1e-5
# Eight bits of mantissa, through two matrix products.
BFLOAT16_TOLERANCE = 2e-2
FLAX_NAMES = {"router": "Router/dense/kernel", **FLAX_EXPERTS}


def golden_of(name: str) -> Golden:
    return Golden(f"{name.partition('_')[0]}_choice_shared", name)


def load(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> tuple[SparseMoE, Tensor]:
    """The layer of a file, in training with its noise or none, and a leaf with its input."""
    settings = golden.settings
    options = {
        "capacity_factor": settings["capacity_factor"],
        "capacity_multiple": settings["capacity_multiple_of"],
        "group_size": settings["group_size"] // settings["tokens"],
        "noise_std": 0.0 if settings["deterministic"] else settings["noise_std"],
    }
    sizes = settings["dim"], settings["num_experts"], settings["mlp_dim"]
    layer: SparseMoE
    if "num_selected_experts" in settings:
        layer = TokensChoice(
            *sizes,
            top_k=settings["num_selected_experts"],
            batch_priority=settings["batch_priority"],
            loss_weights={
                name: settings[f"{name}_loss_weight"] for name in ("importance", "load", "gshard")
            },
            **options,
        )
    else:
        layer = ExpertsChoice(*sizes, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(golden[f"params/{FLAX_NAMES[name]}"])
    if not settings["deterministic"]:
        noise = golden["in/noise"]
        monkeypatch.setattr(torch, "randn_like", lambda logits: noise.expand_as(logits))
    return layer, golden["in/x"].clone().requires_grad_()


def dense(routing: SparseRouting, values: Tensor) -> Tensor:
    """Values of the buffer rows (G, E, C) as the reference's array (G, S, E, C)."""
    tokens = routing.gates.shape[1]
    out = values.new_zeros(len(values), tokens, *values.shape[1:])
    values = torch.where(routing.filled, values, torch.zeros_like(values))
    return out.scatter_add(1, routing.token.unsqueeze(1), values.unsqueeze(1))


@pytest.mark.parametrize("name", ALL)
def test_assignments_and_gates_equal_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = golden_of(name)
    layer, x = load(golden, monkeypatch)
    routing = layer.route(x)
    assert routing.token.shape[2] == golden.settings["capacity"]
    assert_close(routing.gates, golden["out/gates"], VALUE_TOLERANCE)
    mask = dense(routing, routing.filled.float()).bool()
    assert torch.equal(mask, golden["out/dispatch_weights"])
    combine = dense(routing, routing.weight)
    assert_close(combine, golden["out/combine_weights"], VALUE_TOLERANCE)
    loss = (combine * golden["w/combine"]).sum()
    assert_close(loss, golden["loss_combine"], VALUE_TOLERANCE)
    loss.backward()
    assert_close(x.grad, golden["grad_combine/in/x"], GRADIENT_TOLERANCE)
    expected = golden["grad_combine/params/Router/dense/kernel"]
    assert_close(layer.router.grad, expected, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_layer_equals_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_of(name)
    layer, x = load(golden, monkeypatch)
    half = golden.settings["bfloat16"]
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = layer(x)
    assert out.dtype == (torch.bfloat16 if half else torch.float32)
    assert_close(out.float(), golden["out/y"], BFLOAT16_TOLERANCE if half else VALUE_TOLERANCE)

    (out * golden["w/out"]).sum().backward()
    tolerance = BFLOAT16_TOLERANCE if half else GRADIENT_TOLERANCE
    assert_close(x.grad, golden["grad/in/x"], tolerance)
    for key, parameter in layer.named_parameters():
        assert_close(parameter.grad, golden[f"grad/params/{FLAX_NAMES[key]}"], tolerance)


@pytest.mark.parametrize("name", FILES["tokens"])
def test_auxiliary_losses_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_of(name)
    layer, x = load(golden, monkeypatch)
    layer(x)
    terms = layer.auxiliary_losses
    names = {"importance", "gshard"} | (set() if golden.settings["deterministic"] else {"load"})
    assert set(terms) == names
    leaves = [x, layer.router]
    for term in names:
        weight = golden.settings[f"{term}_loss_weight"]
        expected = golden[f"loss_{term}_loss"]
        assert_close(terms[term] / weight, expected, VALUE_TOLERANCE)
        gradients = torch.autograd.grad(terms[term] / weight, leaves, retain_graph=True)
        for gradient, key in zip(gradients, ("in/x", "params/Router/dense/kernel"), strict=True):
            assert_close(gradient, golden[f"grad_{term}_loss/{key}"], GRADIENT_TOLERANCE)
    total = torch.stack(list(terms.values())).sum()
    assert_close(total, golden["loss_aux"], VALUE_TOLERANCE)
    assert_close(total, golden["out/metrics/auxiliary_loss"].mean(), VALUE_TOLERANCE)


@pytest.mark.parametrize("name", ALL)
def test_scalars_equal_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_of(name)
    layer, x = load(golden, monkeypatch)
    scalars = layer.routing_scalars(layer.route(x))
    mask = golden["out/dispatch_weights"]
    load_of_experts = mask.sum((0, 1, 3)).double()
    expected = {
        "unserved_tokens": (~mask.any((2, 3))).double().mean(),
        "expert_load_max": load_of_experts.max() / load_of_experts.mean(),
        "expert_load_cv": load_of_experts.std(correction=0) / load_of_experts.mean(),
    }
    if isinstance(layer, TokensChoice):
        choices = golden.settings["num_selected_experts"] * mask[..., 0, 0].numel()
        expected["dropped_assignments"] = torch.tensor(golden.settings["choices_dropped"] / choices)
    else:
        ratio = "out/metrics/ratio_processed_items_by_at_least"
        expected |= {f"served_by_{n}": golden[f"{ratio}_{n}_experts"].mean() for n in (2, 4)}
        assert expected["unserved_tokens"].item() == pytest.approx(
            1 - golden[f"{ratio}_1_experts"].mean().item()
        )
    assert set(scalars) == set(expected)
    for key, value in expected.items():
        assert scalars[key].item() == pytest.approx(value.item(), abs=1e-6), key


TIES = np.load(GOLDEN / "sparse_ties.npz")
TIE_CASES = sorted({key.rpartition("/")[0] for key in TIES if "choice/" in key})


def assigned(layer: SparseMoE, gates: Tensor, capacity: int) -> Tensor:
    """Combine weights (S, E, C) that `layer` gives to gates (S, E)."""
    token, filled = layer.assign(gates[None], capacity)
    weight = gates[None].transpose(1, 2).gather(2, token)
    return dense(SparseRouting(gates, gates, gates[None], token, weight, filled), weight)[0]


@pytest.mark.parametrize("case", TIE_CASES)
def test_ties_go_to_the_first(case: str) -> None:
    gates = torch.from_numpy(TIES["in/gates"])
    family, _, choice = case.partition("/")
    capacity = int(choice.rpartition("c")[2])
    layer: SparseMoE = ExpertsChoice(2, 4)
    if family == "tokens_choice":
        layer = TokensChoice(2, 4, top_k=int(choice[1]), batch_priority="bpr" in choice)
    expected = torch.from_numpy(TIES[f"{case}/combine_weights"])
    assert torch.equal(assigned(layer, gates, capacity), expected)


def test_among_many_equal_tokens_the_earliest_stay() -> None:
    """Enough of them that an unstable sort would show."""
    gates = torch.full((1, 300, 2), 0.5)
    for layer in (TokensChoice(2, 2), ExpertsChoice(2, 2)):
        token, filled = layer.assign(gates, 100)
        assert token[0, 0].tolist() == list(range(100))
        assert filled[0, 0].all()


WORKED_GATES = torch.tensor([[0.4, 0, 0.2], [0.5, 0.1, 0.4], [0.3, 0.2, 0.6]])


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (
            TokensChoice(2, 3, top_k=2, batch_priority=False),
            {(0, 0, 0): 0.4, (0, 2, 1): 0.2, (1, 0, 1): 0.5, (2, 2, 0): 0.6},
        ),
        (
            TokensChoice(2, 3, top_k=2, batch_priority=True),
            {(0, 0, 1): 0.4, (1, 0, 0): 0.5, (1, 2, 1): 0.4, (2, 2, 0): 0.6},
        ),
        (
            ExpertsChoice(2, 3),
            {
                **{(0, 0, 1): 0.4, (1, 0, 0): 0.5, (1, 1, 1): 0.1},
                **{(1, 2, 1): 0.4, (2, 1, 0): 0.2, (2, 2, 0): 0.6},
            },
        ),
    ],
    ids=["tokens", "tokens with priority", "experts"],
)
def test_worked_assignments(layer: SparseMoE, expected: dict[tuple[int, int, int], float]) -> None:
    weights = assigned(layer, WORKED_GATES, 2)
    found = {tuple(place.tolist()): weights[tuple(place)].item() for place in weights.nonzero()}
    assert found == pytest.approx(expected)


def test_worked_losses() -> None:
    gates = torch.tensor([[[0.5, 0.4, 0.1], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7], [0.8, 0.2, 0]]])
    assert importance_loss(gates).item() == pytest.approx(0.03875, abs=1e-6)
    assert gshard_loss(gates).item() == pytest.approx(1.0875, abs=1e-6)
    clean = torch.tensor([[[0.9, 0.06, 0.04], [0.7, 0.18, 0.12], [0.85, 0.05, 0.1]]])
    noise = torch.tensor(
        [[[-0.037, 0.026, -0.018], [-0.074, 0.045, -0.015], [-0.067, -0.059, 0.073]]]
    )
    assert load_loss(clean, clean + noise, 2, 0.1).item() == pytest.approx(0.485738, abs=1e-6)

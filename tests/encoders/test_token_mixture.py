"""Token, image and hierarchical mixtures: their formulas, their limits and their cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import Mlp
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from encoders.token_mixture import HierarchicalMixture, ImageMixture, Mixture, TokenMixture

DIM, HIDDEN = 16, 24
FORMS: dict[str, tuple[type[Mixture], dict[str, Any]]] = {
    "token": (TokenMixture, {}),
    "token, query": (TokenMixture, {"router": "query"}),
    "token, mlp": (TokenMixture, {"router": "mlp"}),
    "image": (ImageMixture, {}),
    "hierarchical": (HierarchicalMixture, {"num_groups": 2, "group_temperature": 0.7}),
}
every_form = pytest.mark.parametrize("form", FORMS)


def make(form: str, num_experts: int = 4, **options: Any) -> Mixture:
    """A mixture in float64 whose weights are far from uniform."""
    torch.manual_seed(0)
    kind, own = FORMS[form]
    layer = kind(DIM, num_experts, HIDDEN, **{"dtype": torch.float64, "temperature": 0.5} | own
                 | options)  # fmt: skip
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("embedding"):
                parameter.normal_()
    return layer


def tokens(batch: int = 3, count: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, count, DIM, dtype=torch.float64, generator=generator)


def expert_outputs(layer: Mixture, x: Tensor) -> Tensor:
    """Every expert on every token, (E, B, M, d)."""
    rows = x.flatten(0, 1)
    return torch.stack(
        [layer.experts(rows.expand(layer.num_experts, -1, -1))[e].view_as(x)
         for e in range(layer.num_experts)]
    )  # fmt: skip


def scores(layer: Mixture, x: Tensor) -> Tensor:
    """The table's scores, written out, (B, M or 1, E)."""
    state = dict(layer.scores.named_parameters())
    if isinstance(layer, ImageMixture):
        x = x.mean(1, keepdim=True)
    if "fc1.weight" in state:
        return F.silu(x @ state["fc1.weight"].T) @ state["fc2.weight"].T
    if "query.weight" in state:
        return (x @ state["query.weight"].T) @ state["keys.embedding"].T
    return x @ state["embedding"].T


def weights_of(layer: Mixture, x: Tensor) -> Tensor:
    inner = scores(layer, x) / 0.5
    if not isinstance(layer, HierarchicalMixture):
        return inner.softmax(-1)
    outer = (x @ layer.group_scores.embedding.T / 0.7).softmax(-1)
    parts = [half.softmax(-1) for half in inner.split(2, -1)]
    return torch.cat([outer[..., g : g + 1] * part for g, part in enumerate(parts)], -1)


@every_form
@pytest.mark.parametrize("residual", [False, True])
def test_outputs_and_gradients_follow_the_formula(form: str, residual: bool) -> None:
    layer, x = make(form, residual_experts=residual), tokens().requires_grad_()
    leaves = [x, *layer.parameters()]
    mlps = layer.experts.mlps if residual else layer.experts
    for weighting in ("outputs", "inputs_and_outputs"):
        layer.weights_inputs = weighting == "inputs_and_outputs"
        weights = weights_of(layer, x)
        expected = torch.zeros_like(x)
        for e in range(4):
            w = weights[..., e : e + 1]
            inputs = w * x if layer.weights_inputs else x
            hidden = F.gelu(inputs @ mlps.fc1_weight[e] + mlps.fc1_bias[e], approximate="tanh")
            output = hidden @ mlps.fc2_weight[e] + mlps.fc2_bias[e]
            if residual:
                scale, shift = layer.experts.norm_weight[e], layer.experts.norm_bias[e]
                output = F.layer_norm(inputs + output, (DIM,), scale, shift, eps=1e-6)
            expected = expected + w * output
        out = layer(x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        others = torch.autograd.grad(expected.square().sum(), leaves)
        torch.testing.assert_close(gradients, others, rtol=1e-10, atol=1e-12)


@every_form
def test_weights_are_positive_and_sum_to_one(form: str) -> None:
    layer = make(form)
    weights = layer.route(tokens())
    assert weights.shape == (3, 7, 4)
    assert weights.min() > 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7, dtype=torch.float64))
    assert weights.std() > 0.1  # the other tests see weights that matter


@every_form
def test_a_high_temperature_is_the_mean_of_the_experts(form: str) -> None:
    high = {"group_temperature": 1e9} if form == "hierarchical" else {}
    layer, x = make(form, temperature=1e9, **high), tokens()
    torch.testing.assert_close(layer.route(x), torch.full((3, 7, 4), 0.25, dtype=torch.float64))
    torch.testing.assert_close(layer(x), expert_outputs(layer, x).mean(0))


@every_form
def test_a_low_temperature_is_the_best_expert(form: str) -> None:
    low = {"group_temperature": 1e-9} if form == "hierarchical" else {}
    layer, x = make(form, temperature=1e-9, **low), tokens()
    best = scores(layer, x).expand(3, 7, 4)
    if isinstance(layer, HierarchicalMixture):
        group = layer.group_scores(x).argmax(-1, keepdim=True)
        best = best.masked_fill(torch.arange(4) // 2 != group, -torch.inf)
    chosen = best.argmax(-1)
    assert chosen.unique().numel() > 1
    index = chosen[None, ..., None].expand(1, 3, 7, DIM)
    expected = expert_outputs(layer, x).gather(0, index)[0]
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-13)


@every_form
def test_one_expert_is_the_dense_mlp_bit_for_bit(form: str) -> None:
    groups = {"num_groups": 1} if form == "hierarchical" else {}
    layer = make(form, 1, dtype=torch.float32, **groups)
    dense = Mlp(DIM, HIDDEN, act_layer=lambda: torch.nn.GELU(approximate="tanh"))
    bank = layer.experts
    with torch.no_grad():
        dense.fc1.weight.copy_(bank.fc1_weight[0].T)
        dense.fc1.bias.copy_(bank.fc1_bias[0].normal_())
        dense.fc2.weight.copy_(bank.fc2_weight[0].T)
        dense.fc2.bias.copy_(bank.fc2_bias[0].normal_())
    x = tokens().float()
    assert torch.equal(layer(x), bank(x.view(1, -1, DIM)).view_as(x))
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-6, atol=1e-6)


@every_form
def test_identical_experts_make_the_weights_irrelevant(form: str) -> None:
    layer, x = make(form, identical_experts=True), tokens()
    torch.testing.assert_close(layer(x), expert_outputs(layer, x)[0])
    different = make(form)
    assert not torch.allclose(different(x), expert_outputs(different, x)[0], rtol=0.1)


@every_form
def test_expert_order_does_not_matter(form: str) -> None:
    # Groups stay together in the hierarchical form: they and their members change places.
    order = torch.tensor([3, 2, 0, 1] if form == "hierarchical" else [2, 0, 3, 1])
    layer, shuffled, x = make(form), make(form), tokens()
    state = {}
    for name, value in layer.state_dict().items():
        if name == "group_scores.embedding":
            state[name] = value.flip(0)
        elif name.startswith("experts.") or name.endswith(("embedding", "fc2.weight")):
            state[name] = value[order]
        else:
            state[name] = value
    shuffled.load_state_dict(state)
    assert not torch.allclose(shuffled.route(x), layer.route(x))
    torch.testing.assert_close(shuffled(x), layer(x))


@every_form
@pytest.mark.parametrize("weighting", ["outputs", "inputs_and_outputs"])
def test_batch_mates_do_not_matter(form: str, weighting: str) -> None:
    layer, x = make(form, weighting=weighting), tokens()
    alone = torch.cat([layer(image[None]) for image in x])
    torch.testing.assert_close(layer(x), alone, rtol=1e-12, atol=1e-13)
    x.requires_grad_()
    layer(x)[1].sum().backward()
    assert x.grad is not None
    assert [bool(image.any()) for image in x.grad] == [False, True, False]


def test_an_image_mixture_has_one_weighting_per_image() -> None:
    weights = make("image").route(tokens())
    assert torch.equal(weights, weights[:, :1].expand(-1, 7, -1))
    assert not torch.allclose(weights[0], weights[1])


@pytest.mark.parametrize("num_groups", [1, 4])
def test_trivial_groups_are_the_flat_form(num_groups: int) -> None:
    flat, x = make("token"), tokens()
    layer = make("hierarchical", num_groups=num_groups, group_temperature=0.5)
    assert isinstance(layer, HierarchicalMixture)
    layer.experts.load_state_dict(flat.experts.state_dict())
    deciding = layer.scores if num_groups == 1 else layer.group_scores
    deciding.load_state_dict(flat.scores.state_dict())
    torch.testing.assert_close(layer.route(x), flat.route(x), rtol=1e-14, atol=0)
    torch.testing.assert_close(layer(x), flat(x), rtol=1e-12, atol=1e-13)


def test_experts_cost_as_many_dense_mlps_as_there_are() -> None:
    x = torch.randn(2, 5, DIM)
    dense = Mlp(DIM, HIDDEN)
    with FlopCounterMode(display=False) as counter:
        dense(x)
    expected = counter.get_total_flops()
    for form in FORMS:
        layer = make(form, 4, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter:
            layer.experts(x.flatten(0, 1).expand(4, -1, -1))
        assert counter.get_total_flops() == layer.expert_flops_ratio() * expected == 4 * expected


def test_the_input_is_not_copied_for_every_expert() -> None:
    layer, x = make("token"), tokens()
    seen = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer(x)
    (rows,) = seen
    assert rows.shape == (4, 21, DIM)
    assert rows.data_ptr() == x.data_ptr()


@every_form
def test_routing_stays_in_float32_under_autocast(form: str) -> None:
    layer, x = make(form, dtype=torch.float32), tokens().float()
    expected = layer.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.route(x), expected)
        out = layer(x)
    assert out.dtype == torch.bfloat16
    error = (out.float() - layer(x)).abs().max() / layer(x).abs().max()
    assert error < 0.02


def test_initialisers() -> None:
    torch.manual_seed(0)
    layer = TokenMixture(64, 32, 8, router="query", temperature="learned", residual_experts=True)
    keys = layer.scores.keys.embedding
    assert keys.std().item() == pytest.approx(0.02, rel=0.05)
    bound = (6 / 128) ** 0.5
    assert 0.99 * bound < layer.scores.query.weight.abs().max() <= bound
    first = layer.experts.mlps.fc1_weight
    assert torch.pdist(first.flatten(1)).min() > 0
    old = keys.detach().clone()
    layer.temperature.log_value.data.fill_(3.0)
    layer.init_weights()
    assert not torch.equal(old, keys)
    assert layer.temperature.value() == 1.0


def test_what_is_not_decayed() -> None:
    layer = HierarchicalMixture(
        8, 4, num_groups=2, router="query", temperature="learned", residual_experts=True
    )
    decayed = set(dict(layer.named_parameters())) - layer.no_weight_decay()
    assert decayed == {
        "experts.mlps.fc1_weight", "experts.mlps.fc2_weight", "scores.query.weight",
        "group_scores.query.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"router": "cosine"}, "choose one of embedding, query, mlp"),
        ({"weighting": "inputs"}, "weighting 'inputs': choose"),
        ({"num_experts": 0}, "num_experts"),
        ({"hidden_dim": 0}, "hidden_dim"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"num_groups": 3}, "num_groups 3 does not divide num_experts 4"),
        ({"num_groups": 0}, "num_groups 0"),
        ({"group_temperature": -1.0}, "temperature must be positive"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], problem: str) -> None:
    settings: dict[str, Any] = {"dim": 8, "num_experts": 4, "num_groups": 2} | change
    with pytest.raises(ValueError, match=problem):
        HierarchicalMixture(**settings)

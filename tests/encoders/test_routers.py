"""Building routed layers by name: options, capacity, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from encoders import routers
from encoders.routers import build_routed_layer, router_options
from encoders.soft_moe import SoftMoE


class WithGroups(SoftMoE):
    """A layer that hands on what it does not know, and has an option called router."""

    def __init__(self, dim: int, num_experts: int, *, router: str = "plain", **rest: Any) -> None:
        super().__init__(dim, num_experts, **rest)
        self.router = router


def build(router: str = "soft", /, **options: Any) -> Any:
    return build_routed_layer(router, 8, 4, 16, tokens=10, **options)


def test_options_reach_the_layer() -> None:
    layer = build(slots_per_expert=3, noise_std=0.5, normalize=False, dropout=0.1)
    assert layer.phi.shape == (8, 4, 3)
    assert layer.experts.fc1_weight.shape == (4, 8, 16)
    assert (layer.noise_std, layer.normalize, layer.experts.dropout.p) == (0.5, False, 0.1)


def test_options_of_a_base_class_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(routers.ROUTERS, "with_groups", WithGroups)
    assert router_options("with_groups") == router_options("soft") | {"router"}
    layer = build("with_groups", router="fancy", slots_per_expert=2)
    assert (layer.router, layer.phi.shape[2]) == ("fancy", 2)


def test_capacity_factor_becomes_slots() -> None:
    assert build(capacity_factor=2.0).phi.shape == (8, 4, 5)


@pytest.mark.parametrize(
    ("router", "options", "message"),
    [
        ("sofd", {}, "'sofd' does not exist; did you mean soft"),
        ("soft", {"noise_sdt": 1.0}, "no option 'noise_sdt'; did you mean noise_std"),
        ("soft", {"top_k": 2}, "no option 'top_k'; choose from: identical_experts, noise_std"),
        ("soft", {"dim": 2}, "no option 'dim'"),
        ("soft", {"capacity_factor": 0.2}, "capacity_factor 0.2 leaves 4 experts without a slot"),
        ("soft", {"capacity_factor": -1.0}, "capacity_factor must be positive, got -1.0"),
        ("soft", {"capacity_factor": 1.0, "slots_per_expert": 2}, "exclude each other"),
        ("soft", {"slots_per_expert": 0}, "slots_per_expert must be at least 1, got 0"),
        ("soft", {"capacity_factor": "1"}, r"router 'soft' .* \{'capacity_factor': '1'\}: "),
        ("tokens_choice", {"top_k": "2"}, r"router 'tokens_choice' .* \{'top_k': '2'\}: "),
        (
            "tokens_choice",
            {"loss_weights": {"y": 1}},
            "'y'.*choose from importance, load, gshard, z",
        ),
        ("tokens_choice", {"loss_weights": "z"}, r"router 'tokens_choice' .*'loss_weights': 'z'"),
        ("token_mixture", {"temperature": None}, r"'token_mixture' .* \{'temperature': None\}: "),
        ("token_mixture", {"temperature": [1]}, r"'token_mixture' .* \{'temperature': \[1\]\}: "),
        ("image_mixture", {"temperature": {"start": "a", "minimum": 1}}, r"'image_.*'start': 'a'"),
        ("hierarchical_mixture", {}, r"router 'hierarchical_mixture' .* 'num_groups'"),
    ],
)
def test_what_a_layer_does_not_take_is_refused(
    router: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(router, **options)

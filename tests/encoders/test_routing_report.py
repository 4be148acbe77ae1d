"""Routing statistics, slot choice and the slot map figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from encoders import variants
from encoders.routers import ROUTERS
from encoders.routing_report import choose_slots, draw_slot_maps, slot_maps
from encoders.routing_statistics import (
    RoutingMonitor,
    collect_routing,
    collect_soft_routing,
    layer_statistics,
    routing_scalars,
    routing_statistics,
)
from encoders.soft_moe import RoutingWeights, SoftMoE

SOFT = {
    "dispatch_max", "dispatch_entropy", "starved_tokens",
    "combine_max", "combine_entropy", "expert_importance_cv",
}  # fmt: skip
SPARSE = {"unserved_tokens", "expert_load_max", "expert_load_cv"}
FIGURES = {
    "soft": SOFT, "identity": SOFT, "uniform": SOFT, "soft_uniform": SOFT, "uniform_soft": SOFT,
    "tokens_choice": SPARSE | {"dropped_assignments"},
    "experts_choice": SPARSE | {"served_by_2", "served_by_4"},
}  # fmt: skip


def thin_model(router: str = "soft", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if router in ("soft", "tokens_choice", "experts_choice"):
        options |= {"router_options": {"noise_std": 1.0}}
    return variants.soft_moe_vit_micro_patch8_64(
        embed_dim=24, depth=4, moe_blocks=2, num_experts=4, router=router, **options
    )


def from_logits(logits: Tensor) -> RoutingWeights:
    return RoutingWeights(logits, logits.softmax(1), logits.softmax(2))


def peaked(batch: int, tokens: int, peaks: list[int], strength: float = 50.0) -> Tensor:
    """Dispatch weights (B, M, S) whose slot s looks at token peaks[s] of every image."""
    logits = torch.zeros(batch, tokens, len(peaks))
    for slot, token in enumerate(peaks):
        logits[:, token, slot] = strength
    return logits.softmax(1)


def test_collects_what_every_layer_decides() -> None:
    model = thin_model()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    images = torch.randn(2, 3, 64, 64)
    inputs: list[Tensor] = []
    hook = model.blocks[3].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    routing = collect_soft_routing(model, images)
    hook.remove()
    assert list(routing) == ["blocks.2.mlp", "blocks.3.mlp"]
    assert [module.training for module in model.modules()] == modes
    layer = model.blocks[3].mlp
    assert isinstance(layer, SoftMoE)
    # Router noise is on in training, so equality shows that the model ran in eval mode.
    for weights, expected in zip(
        routing["blocks.3.mlp"], layer.eval().route(inputs[0]), strict=True
    ):
        assert weights.shape == (2, 64, 4)
        assert not weights.requires_grad
        assert torch.equal(weights, expected)
    assert not layer._forward_hooks


def test_collecting_restores_the_model_after_an_error() -> None:
    model = thin_model()
    with pytest.raises(AssertionError, match="Input height"):
        collect_routing(model, torch.randn(2, 3, 30, 30))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_without_router_is_refused() -> None:
    with pytest.raises(ValueError, match="moe_blocks"):
        collect_routing(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="no layer with slots"):
        collect_soft_routing(thin_model("experts_choice"), torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("router", FIGURES)
def test_every_router_has_figures_that_training_and_reports_share(router: str) -> None:
    slots = {"slots_per_expert": 16} if router == "identity" else {}
    model, images = thin_model(router, **slots), torch.randn(8, 3, 64, 64)
    collected = layer_statistics(model, collect_routing(model, images))
    assert list(collected) == ["blocks.2.mlp", "blocks.3.mlp"]
    assert set(collected["blocks.3.mlp"]) == FIGURES[router]
    model.blocks[0].eval()  # a part that is frozen stays as it is
    modes = [module.training for module in model.modules()]
    monitor, state = RoutingMonitor(model), torch.get_rng_state()
    watched_outputs, outputs = [], []
    for active, results in ((True, watched_outputs), (False, outputs)):
        torch.set_rng_state(state)
        with monitor.watch(active) as figures:
            results.append(model(images))
        results.append(torch.get_rng_state())
        model(images)  # outside, so not watched
        assert len(figures) == active * 2 * len(FIGURES[router])
        if active:
            # The clean router's figures: in this pass the noise was on, there it was off.
            first = {name: value for name, value in figures.items() if "blocks.2" in name}
            assert not any(value.requires_grad or value.ndim for value in first.values())
            expected = collected["blocks.2.mlp"]
            assert {f"routing/blocks.2/{name}": value for name, value in expected.items()} == (
                pytest.approx({name: value.item() for name, value in first.items()}, abs=1e-6)
            )
    assert torch.equal(watched_outputs[0], outputs[0])  # watching draws no random number
    assert torch.equal(watched_outputs[1], outputs[1])
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())


def test_watching_a_compiled_model_needs_guards_on_hooks() -> None:
    layer = SoftMoE(8, 2)
    monitor = RoutingMonitor(nn.Sequential(layer))
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(layer, backend="eager")
        for active in (False, True, False, True):
            with monitor.watch(active) as figures:
                compiled(torch.randn(2, 4, 8))
            assert len(figures) == active * len(SOFT)


def test_all_routers_are_covered() -> None:
    asked = {name for name, layer in ROUTERS.items() if hasattr(layer, "route")}
    assert asked == set(ROUTERS)
    assert set(FIGURES) <= asked


def test_plain_weights_of_a_mixture_have_figures_of_its_experts() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).expand(3, 2, 2)
    figures = {name: value.item() for name, value in routing_scalars(None, weights).items()}
    assert figures == pytest.approx(
        {"combine_max": 0.75, "combine_entropy": 0.5, "expert_importance_cv": 0.5}
    )


@pytest.mark.parametrize(
    ("router", "slots"), [("identity", 16), ("uniform", 2), ("soft_uniform", 2)]
)
def test_weights_that_a_layer_reports_are_those_it_applies(router: str, slots: int) -> None:
    torch.manual_seed(0)
    layer = ROUTERS[router](8, 4, slots, identical_experts=False)
    x = torch.randn(2, 64, 8)
    _, dispatch, combine = layer.route(x)
    inputs = (dispatch.mT @ x).unflatten(1, (4, slots)).transpose(0, 1)
    outputs = layer.experts(inputs.reshape(4, 2 * slots, 8)).unflatten(1, (2, slots))
    torch.testing.assert_close(layer(x), combine @ outputs.transpose(0, 1).flatten(1, 2))


def test_statistics_of_uniform_routing() -> None:
    statistics = routing_statistics(from_logits(torch.zeros(2, 9, 6)), 3)
    assert statistics == pytest.approx(
        {
            "dispatch_max": 1 / 9,
            "combine_max": 1 / 6,
            "dispatch_entropy": 1.0,
            "combine_entropy": 1.0,
            "expert_importance_cv": 0.0,
            "starved_tokens": 0.0,
        },
        abs=1e-6,
    )


def test_statistics_of_routing_to_one_token_and_one_expert() -> None:
    dispatch = peaked(1, 4, [2, 2, 2, 2])
    combine = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 4, 4)
    statistics = routing_statistics(RoutingWeights(dispatch, dispatch, combine), 2)
    assert statistics == pytest.approx(
        {
            "dispatch_max": 1.0,
            "combine_max": 1.0,
            "dispatch_entropy": 0.0,
            "combine_entropy": 0.0,
            "expert_importance_cv": 1.0,
            "starved_tokens": 0.75,
        }
    )


def test_importance_groups_slots_by_expert() -> None:
    # Slots 0 and 1 belong to expert 0: unequal slots, equal experts.
    combine = torch.tensor([0.5, 0.0, 0.2, 0.3]).expand(1, 3, 4)
    weights = RoutingWeights(combine, torch.full((1, 3, 4), 1 / 3), combine)
    assert routing_statistics(weights, 2)["expert_importance_cv"] == pytest.approx(0.0, abs=1e-6)
    # Population spread over the mean of (.5, 0, .2, .3).
    assert routing_statistics(weights, 4)["expert_importance_cv"] == pytest.approx(0.7211, rel=1e-4)


@pytest.mark.parametrize("experts", [0, 4])
def test_experts_that_do_not_divide_the_slots_are_refused(experts: int) -> None:
    with pytest.raises(ValueError, match=f"6 slots .* {experts} experts"):
        routing_statistics(from_logits(torch.zeros(1, 4, 6)), experts)


def test_slot_maps_keep_rows_and_columns() -> None:
    dispatch = torch.arange(2 * 6 * 4.0).view(2, 6, 4)
    maps = slot_maps(dispatch, (2, 3))
    assert maps.shape == (2, 4, 2, 3)
    assert maps[1, 3, 1, 2] == dispatch[1, 1 * 3 + 2, 3]
    with pytest.raises(ValueError, match="3x3 does not hold 6"):
        slot_maps(dispatch, (3, 3))


def test_chosen_slots_are_concentrated_and_different() -> None:
    # Slots 1 and 3 agree, slot 4 is the sharpest after them, 0 and 2 are uniform.
    dispatch = torch.full((2, 16, 5), 1 / 16)
    dispatch[:, :, [1, 3]] = peaked(2, 16, [7, 7], strength=6.0)
    dispatch[:, :, [4]] = peaked(2, 16, [2], strength=4.0)
    assert choose_slots(dispatch, 2) == [1, 4]
    assert sorted(choose_slots(dispatch, 5)) == [0, 1, 2, 3, 4]
    assert choose_slots(torch.full((1, 4, 3), 0.25), 2) == [0, 1]
    for count in (0, 6):
        with pytest.raises(ValueError, match="1 to 5"):
            choose_slots(dispatch, count)


def test_figure_has_a_row_per_image_and_a_column_per_slot(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    dispatch = peaked(2, 24, [0, 5, 23, 7], strength=3.0)
    path = tmp_path / "maps.png"
    figure = draw_slot_maps(images, dispatch, [1, 2], path, slots_per_expert=2)
    panels = figure.axes[:6]
    titles = ["image", "slot 1 · expert 0", "slot 2 · expert 1", "", "", ""]
    assert [panel.get_title() for panel in panels] == titles
    assert (panels[3].get_images()[0].get_array() == images[1].permute(1, 2, 0).numpy()).all()
    heat = panels[4].get_images()[1]
    # Row order: token 5 of a 4x6 grid is the last of the first row, and 24 tokens are uniform at 1.
    assert heat.get_array().shape == (4, 6)
    assert heat.get_array().argmax() == 5
    assert heat.get_array().max() == pytest.approx(24 * dispatch[1, 5, 1].item())
    assert heat.get_extent() == panels[4].get_images()[0].get_extent()
    with Image.open(path) as picture:
        assert picture.width > picture.height > 300


@pytest.mark.parametrize(
    ("images", "tokens", "problem"),
    [
        (torch.zeros(1, 3, 32, 32), 16, "uint8"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 16, "2 images"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 17, "17 tokens"),
        (torch.zeros(1, 3, 32, 64, dtype=torch.uint8), 16, "16 tokens"),
    ],
)
def test_what_cannot_be_drawn_is_refused(images: Tensor, tokens: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        draw_slot_maps(images, torch.ones(1, tokens, 2), [0])

"""How auxiliary losses reach the training loss: each of them, once, with its gradient.

Run as a program, this file is one of two processes: `test_auxiliary_losses.py RANK FOLDER`.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from encoders.auxiliary_losses import (
    add_auxiliary_losses,
    collect_auxiliary_losses,
    routed_layers,
)
from encoders.soft_moe import SoftMoE
from encoders.sparse_moe import TokensChoice

WORLD, BATCH = 2, 8


class Stack(nn.Module):
    """Two routed layers with residuals, optionally checkpointed; the output is a task loss."""

    def __init__(self, reentrant: bool | None = None, noise_std: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        options: dict[str, Any] = {
            "group_size": 2,
            "noise_std": noise_std,
            "loss_weights": {"importance": 0.5, "gshard": 0.25},
            "identical_experts": False,
        }
        self.layers = nn.ModuleList(TokensChoice(8, 4, 6, **options) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.reentrant is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.reentrant)
        return x.square().mean()


class WithLoss(nn.Module):
    """An objective in short: the task loss plus what the layers add."""

    def __init__(self, model: Stack) -> None:
        super().__init__()
        self.model = model
        self._routed_layers = routed_layers(model)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        metrics: dict[str, Tensor] = {}
        loss = self.model(x)
        return add_auxiliary_losses(loss, metrics, self._routed_layers), metrics


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, 6, 8, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


def train_step(module: WithLoss, x: Tensor) -> dict[str, Tensor]:
    """Gradients of one step, with the same router noise every time."""
    module.zero_grad()
    torch.manual_seed(1)
    module(x)[0].backward()
    return gradients(module)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_terms_are_summed_over_layers_and_given_once() -> None:
    model = Stack()
    model(inputs())
    separate = [dict(layer.auxiliary_losses) for layer in routed_layers(model)]
    assert len(separate) == 2
    sums = collect_auxiliary_losses(model)
    assert set(sums) == {"importance", "load", "gshard"}
    for name, value in sums.items():
        torch.testing.assert_close(value, separate[0][name] + separate[1][name])
    assert collect_auxiliary_losses(model) == {}


def test_models_without_terms_give_none() -> None:
    assert collect_auxiliary_losses(nn.Linear(8, 8)) == {}
    soft = SoftMoE(8, 4)
    soft(inputs())
    metrics: dict[str, Tensor] = {}
    loss = torch.tensor(1.0)
    assert add_auxiliary_losses(loss, metrics, routed_layers(soft)) is loss
    assert metrics == {}


def test_loss_and_metrics_hold_the_terms_and_the_gradient_is_theirs() -> None:
    module = WithLoss(Stack(noise_std=0))
    loss, metrics = module(inputs())
    assert set(metrics) == {"auxiliary/importance", "auxiliary/gshard"}
    assert not any(value.requires_grad for value in metrics.values())
    task = module.model(inputs())
    torch.testing.assert_close(loss, task + sum(metrics.values()))
    terms = collect_auxiliary_losses(module)
    total = torch.stack([task, *terms.values()]).sum()
    routers = [layer.router for layer in routed_layers(module)]
    for ours, expected, bare in zip(
        torch.autograd.grad(loss, routers),
        torch.autograd.grad(total, routers, retain_graph=True),
        torch.autograd.grad(task, routers),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected)
        assert (ours - bare).norm() > 0.1 * bare.norm()


def test_eval_mode_leaves_no_term_behind() -> None:
    model = Stack()
    model(inputs())
    model.eval()(inputs())
    assert collect_auxiliary_losses(model) == {}


def test_two_forward_passes_in_one_step_both_count() -> None:
    module = WithLoss(Stack(noise_std=0))
    one, two = train_step(module, inputs(1)), train_step(module, inputs(2))
    module.zero_grad()
    (module(inputs(1))[0] + module(inputs(2))[0]).backward()
    assert_same(gradients(module), {name: one[name] + two[name] for name in one})
    # Without collecting in between, the terms are those of the latest pass.
    module.model(inputs(1))
    module.model(inputs(2))
    latest = collect_auxiliary_losses(module)
    module.model(inputs(2))
    for name, value in collect_auxiliary_losses(module).items():
        assert torch.equal(value, latest[name])


def test_checkpointing_changes_no_gradient_and_offers_no_term_twice() -> None:
    expected = [train_step(WithLoss(Stack()), inputs(seed)) for seed in (0, 1)]
    module = WithLoss(Stack(reentrant=False))
    for seed in (0, 1):
        assert_same(train_step(module, inputs(seed)), expected[seed])
        # The backward pass ran the layers again, and they kept quiet.
        assert collect_auxiliary_losses(module) == {}
        copy.deepcopy(module)  # which a tensor of a graph would refuse


def test_terms_that_lost_their_gradient_are_refused() -> None:
    module = WithLoss(Stack(reentrant=True))
    with pytest.raises(RuntimeError, match=r"'importance' has no gradient.*use_reentrant=False"):
        module(inputs().requires_grad_())
    module = WithLoss(Stack())
    with torch.no_grad():
        loss, metrics = module(inputs())
    assert metrics["auxiliary/importance"] > 0
    assert loss > 0
    module.requires_grad_(False)
    assert module(inputs())[1]["auxiliary/importance"] > 0


def distributed_gradients(rank: int, folder: Path) -> dict[str, Tensor]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    module = WithLoss(Stack(reentrant=False, noise_std=0))
    wrapped: Callable[..., Any] = DistributedDataParallel(module)
    for _ in range(2):  # the second step would trip over what the first has left
        module.zero_grad()
        wrapped(inputs().chunk(WORLD)[rank])[0].backward()
    found = gradients(module)
    distributed.destroy_process_group()
    return found


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)])
        for rank in range(WORLD)
    ]
    assert [child.wait(120) for child in children] == [0] * WORLD
    expected = train_step(WithLoss(Stack(noise_std=0)), inputs())
    for rank in range(WORLD):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


if __name__ == "__main__":
    torch.save(
        distributed_gradients(int(sys.argv[1]), Path(sys.argv[2])),
        Path(sys.argv[2]) / f"{sys.argv[1]}.pt",
    )

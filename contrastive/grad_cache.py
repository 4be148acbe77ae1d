"""Gradient caching: a contrastive batch in parts, with the gradient of the whole batch.

The loss of a contrastive batch is not the mean over its parts, which would lack one another's
negatives. So the features of all parts are computed first, without gradients; then the loss of
the global batch and its gradient by the features; then every part once more, with gradients, from
the random state it had, and that gradient is carried on into the towers (Gao et al., 2021, arXiv
2101.06983). A second forward pass is the price; activations of one part are all that is kept. A
frozen image trunk or Hugging Face model runs once: the second pass begins at its embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from training.objective import Batch, Metrics

Features = dict[str, Tensor]
Head = Callable[[Features], tuple[Tensor, Metrics]]

ROWS = ("image_features", "text_features")
# What the trained projection of a frozen tower reads; in a batch, it takes the tower's place.
EMBEDDINGS = ("image_embedding", "text_embedding")


def cached_part_losses(
    forward: Callable[[Batch, Head], tuple[Tensor, Metrics]], head: Head, parts: Sequence[Batch]
) -> Iterator[tuple[Tensor, Metrics]]:
    """Yield a loss for each part, whose mean has the value and gradient of the whole batch's loss.

    Every call of `forward` that needs gradients is made when its loss is asked for, so that the
    caller decides which backward pass is synchronised. Random numbers are those of one forward pass
    over the parts in turn, and so is the random state that is left behind. Exact for towers that
    treat each sample, or each group within a part, alone.

    Args:
        forward: runs the towers on a part, calls the given head on the features and may add losses
            of that part: means over its samples, such as auxiliary losses of routers.
        head: the loss of features of the whole batch: `ROWS`, concatenated over parts, and others,
            which do not depend on the samples, such as `logit_scale`. `EMBEDDINGS` among them are
            not for the loss: the second pass gets them in its part.
        parts: of this process's share of the batch; they may differ in size.
    """
    recorded: list[Features] = []
    embeddings: list[Features] = []
    states: list[Callable[[], None]] = []
    first_metrics: list[Metrics] = []

    def record(features: Features) -> tuple[Tensor, Metrics]:
        found = {name: value.detach() for name, value in features.items()}
        embeddings.append({name: found.pop(name) for name in EMBEDDINGS if name in found})
        recorded.append(found)
        return torch.zeros((), device=features[ROWS[0]].device), {}

    with torch.no_grad():
        for part in parts:
            states.append(_random_state(part))
            first_metrics.append(forward(part, record)[1])
    value, metrics, gradients = _differentiate(head, recorded)
    for number, part in enumerate(parts):
        states[number]()
        replay = partial(_replay, value, metrics, gradients[number])
        loss, some = forward(part | embeddings[number], replay)
        yield loss, first_metrics[number] | some  # a tower that runs once is seen in the first pass


def _differentiate(
    head: Head, recorded: list[Features]
) -> tuple[Tensor, Metrics, list[dict[str, Tensor]]]:
    """Loss of the whole batch, its metrics, and for each part the gradients that, averaged over
    parts, carry on those of the loss."""
    whole = {
        name: torch.cat([part[name] for part in recorded]) if name in ROWS else value
        for name, value in recorded[0].items()
    }
    with torch.enable_grad():
        loss, metrics = head({name: value.requires_grad_() for name, value in whole.items()})
    found = torch.autograd.grad(loss, list(whole.values()), materialize_grads=True)
    sizes, count = [len(part[ROWS[0]]) for part in recorded], len(recorded)
    # A row belongs to one part, all else to each of them.
    shares = {
        name: (gradient * count).split(sizes) if name in ROWS else (gradient,) * count
        for name, gradient in zip(whole, found, strict=True)
    }
    return loss.detach(), metrics, [{name: shares[name][n] for name in whole} for n in range(count)]


def _replay(
    value: Tensor, metrics: Metrics, gradients: dict[str, Tensor], features: Features
) -> tuple[Tensor, Metrics]:
    """A loss of known value whose backward pass hands `gradients` on to `features`."""
    ordered = tuple(gradients[name] for name in features)
    return _Known.apply(value, ordered, *features.values()), dict(metrics)  # pyrefly: ignore


class _Known(torch.autograd.Function):
    """A 0-D value with known gradients by the tensors that follow."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        pairs = zip(ctx.gradients, needed, strict=True)
        return None, None, *(incoming[0] * known if asked else None for known, asked in pairs)


def _random_state(part: Batch) -> Callable[[], None]:
    """Remember the generators that towers draw from, torch's on the CPU and on the device of the
    part; the result restores them. Neither waits for the device."""
    device = next(value.device for value in part.values() if isinstance(value, Tensor))
    state = torch.get_rng_state()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    device_state = None if module is None else module.get_rng_state(device)

    def restore() -> None:
        torch.set_rng_state(state)
        if module is not None:
            module.set_rng_state(device_state, device)

    return restore

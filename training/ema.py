"""An exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

AVERAGED = "ema/"  # begins the names of figures of the averaged weights


class WeightAverage:
    """Average of the trained parameters of a module, in float32 or wider, beside them.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that short runs do not keep
    their first weights. Buffers and frozen parameters are shared with the module.

    Args:
        decay: share of the average that each update keeps, in (0, 1).

    Raises:
        ValueError: a decay out of range.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"train.ema_decay must lie between 0 and 1, got {decay}")
        self.module, self.decay, self.updates = module, decay, 0
        self.average: dict[str, Tensor] = {
            name: parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).clone()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def _trained(self) -> list[Tensor]:
        parameters = dict(self.module.named_parameters())
        return [parameters[name].detach() for name in self.average]

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average = [_own(value) for value in self.average.values()]
        pairs = zip(self._trained(), average, strict=True)
        present = [_own(value).to(kept.dtype) for value, kept in pairs]
        torch._foreach_lerp_(average, present, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Exchange the module's weights for the average, and back."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, present in zip(self.average.values(), self._trained(), strict=True):
            kept = present.clone()
            present.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """What the module's `state_dict` would be with averaged weights."""
        whole = {name: value.detach() for name, value in self.module.state_dict().items()}
        return whole | {name: self.average[name].to(whole[name].dtype) for name in self.average}

    def state(self) -> dict[str, Tensor]:
        """Tensors that a resumed run needs."""
        return {**self.average, "updates": torch.tensor(self.updates)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`.

        Raises:
            ValueError: it is of other parameters.
        """
        if set(state) != {*self.average, "updates"}:
            raise ValueError("the checkpoint's averaged weights are of other parameters")
        self.updates = int(state["updates"])
        for name, average in self.average.items():
            average.copy_(state[name])


def _own(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is divided, of which no mixture with others is taken."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

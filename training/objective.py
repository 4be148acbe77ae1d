"""What the loop asks of a task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Batch = dict[str, Any]
Metrics = dict[str, Tensor]


def count_samples(batch: Batch) -> int:
    """Length of the batch axis."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def check_share(batch: Batch, share: int, step: int) -> None:
    """Make sure that a process got its share of the batch of a step: means over processes and parts
    would not be the batch's otherwise.

    Raises:
        ValueError: it has another size.
    """
    if count_samples(batch) != share:
        raise ValueError(
            f"the stream gave {count_samples(batch)} samples at step {step}, expected {share}, the"
            " share of each process of train.batch_size"
        )


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Divide the batch axis of every field into `parts` equal pieces.

    Raises:
        ValueError: the pieces would not be equal.
    """
    if parts == 1:
        return [batch]
    size, rest = divmod(count_samples(batch), parts)
    if rest or not size:
        raise ValueError(f"a batch of {count_samples(batch)} samples cannot be split into {parts}")
    return [
        {name: value[part * size : (part + 1) * size] for name, value in batch.items()}
        for part in range(parts)
    ]


class Objective(nn.Module):
    """A model with its loss; the loop wraps, trains and saves it without knowing the task.

    Subclasses implement `forward(batch) -> (loss, metrics)`: the loss is a scalar whose mean over
    processes is the loss of the global batch; metrics are detached 0-D tensors that are averaged
    over processes. All training computation must happen inside `forward`, because that is what
    the distributed wrapper sees.
    """

    model: Any
    """The module that is trained and saved; any, because tasks use what their models offer."""
    weights_file: str = "model.safetensors"
    """Name of the weights in a checkpoint, chosen so that other libraries find them."""
    wants_details: bool = False
    """Set by the loop before each step: its metrics are logged, and may include some that cost
    time to measure."""

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics of this process's rows of a batch."""

    def check_accumulation(self, parts: int, global_batch: int) -> str:
        """Called once if batches are split into `parts`: what the start-up log says about it.

        Raises:
            ValueError: the model cannot be trained on parts of a batch.
        """
        return f"the loss of {global_batch} samples is the mean over their parts"

    def part_losses(
        self, forward: Callable[..., tuple[Tensor, Metrics]], parts: Sequence[Batch]
    ) -> Iterator[tuple[Tensor, Metrics]]:
        """Yield loss and metrics of the parts of a batch, in order.

        The mean of the losses has the value and the gradient of the loss of the whole batch. The
        loop runs the backward pass of one before it asks for the next.

        Args:
            forward: the wrapped objective, which every forward pass goes through.
        """
        for part in parts:
            yield forward(part)

    def compiled_parts(self) -> Sequence[nn.Module]:
        """Modules to compile, each of which is called as a whole."""
        return [self.model]

    def checkpoint_gradients(self) -> None:
        """Compute activations again in the backward pass.

        Raises:
            ValueError: the model does not offer it.
        """
        enable = getattr(self.model, "set_grad_checkpointing", None)
        if enable is None:
            raise ValueError(
                f"train.gradient_checkpointing: {type(self.model).__name__} does not offer it"
            )
        enable(True)

    def training_flops(self) -> float | None:
        """Operations of a training step for one sample: those of the model's forward and backward
        pass, without what is computed again to save memory; None where they cannot be counted.
        Called when it is settled what is trained, and only where somebody wants to know."""
        return None

    def parameter_groups(self) -> dict[str, set[str]]:
        """Names of `model`'s parameters by the `group` of a `ParameterRule`."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Names of `model`'s parameters that must not be decayed."""
        named = getattr(self.model, "no_weight_decay", None)
        # timm models also list tokens that the given one does not have.
        present = {name for name, _ in self.model.named_parameters()}
        return set(named()) & present if named else set()

    def before_step(self, step: int) -> None:
        """Called before every optimizer step with its number, counted from the first as 0, for
        schedules inside the model."""

    def after_step(self) -> None:
        """Called after every optimizer step, for constraints such as a largest logit scale."""

    def config_files(self) -> dict[str, dict[str, Any]]:
        """JSON files, by name, that let other libraries open the saved weights."""
        return {}


class TrainingStream(Protocol):
    """What the loop asks of the data: see `data_pipelines.stream.Stream`."""

    def __len__(self) -> int: ...

    def identity(self) -> dict[str, Any]: ...

    def batches(self, start_step: int = 0) -> Any: ...


class Evaluator(Protocol):
    """Measures a model in eval mode; every process calls it, every process gets the figures."""

    name: str

    def __call__(self, model: nn.Module) -> dict[str, float | None]: ...

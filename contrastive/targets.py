"""What the rows of a contrastive loss should match, beyond the own pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor


class Teacher(NamedTuple):
    """Unit rows of a trained model for the same pairs, without gradient.

    `image` and `text` are (b, T) of this process, `all_image` and `all_text` (B, T) of all
    processes; the width T may differ from the student's. `logit_scale` is exponentiated;
    `logit_bias` serves the sigmoid loss alone.
    """

    image: Tensor
    text: Tensor
    all_image: Tensor
    all_text: Tensor
    logit_scale: float | Tensor
    logit_bias: float | Tensor = 0.0


@dataclass(frozen=True)
class Targets:
    """Options of the contrastive losses; without any, a row matches its own column alone.

    Args:
        groups: int64 marks (b,) of this process; pairs with equal marks show the same thing.
        all_groups: int64 marks (B,) of all processes.
        same_group: "mask" leaves other pairs of the same group out, so that they are not
            negatives; "positive" makes them positives: softmax targets are spread evenly over
            the group, as in supervised contrastive learning (Khosla et al., 2020), and their
            sigmoids are positive.
        label_smoothing: share of a softmax target that is spread evenly over all columns that are
            not left out; a sigmoid's targets become 1 - share / 2 and share / 2.
        weights: factors (b,) on the terms of this process's rows. The loss stays a mean over rows,
            not over weights: weights that average one keep its size.
        teacher: replaces the targets by the teacher's softmax (or sigmoids) of similarities. An
            option of the functions: the objective has no teacher.

    Raises:
        ValueError: one kind of group marks alone, an unknown `same_group`, a share outside [0, 1),
            or a teacher beside other targets.
    """

    groups: Tensor | None = None
    all_groups: Tensor | None = None
    same_group: Literal["mask", "positive"] = "mask"
    label_smoothing: float = 0.0
    weights: Tensor | None = None
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        if (self.groups is None) != (self.all_groups is None):
            raise ValueError("groups and all_groups must be given together, got one of them")
        if self.same_group not in ("mask", "positive"):
            raise ValueError(f"same_group must be mask or positive, got {self.same_group!r}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.teacher is not None and (self.groups is not None or self.label_smoothing):
            raise ValueError(
                "teacher replaces the targets: leave groups out and label_smoothing at 0"
            )

    @property
    def masks(self) -> bool:
        """Whether pairs are left out."""
        return self.groups is not None and self.same_group == "mask"

    @property
    def spreads(self) -> bool:
        """Whether other pairs of the same group are positives."""
        return self.groups is not None and self.same_group == "positive"

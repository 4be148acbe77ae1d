"""What a stream has to know of the samples that it puts in order."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class SampleIndex(Protocol):
    """Samples that are numbered from 0, in one or several groups that are shuffled as wholes."""

    @property
    def sizes(self) -> np.ndarray:
        """Samples in each group, int64."""
        ...

    @property
    def truncated(self) -> tuple[str, ...]:
        """Files that end early, to be told to the user."""
        ...

    def __len__(self) -> int: ...

    def describe(self, sample: int) -> str:
        """What a sample is called in messages, and where it is from."""
        ...

    def fingerprint(self) -> str:
        """A hash that changes with the samples or their numbers."""
        ...

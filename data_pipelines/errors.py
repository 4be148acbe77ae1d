"""What goes wrong with data, for those who read it to catch."""

from __future__ import annotations


class ShardError(ValueError):
    """Shards that cannot be used; the message says which, why, and what to do."""


class FieldError(ValueError):
    """A member that cannot be used; the message is the reason, in a few words."""


class LoaderError(RuntimeError):
    """A loader process has died; the message says which, and what to do."""

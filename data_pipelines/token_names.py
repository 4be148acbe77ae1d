"""Tokens of captions, as strings, by the tokenizer of a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from data_pipelines.shards import ShardError

# Of a caption no more is tokenized: byte-pair merging takes quadratic time for a word without end.
MAX_LETTERS = 4096


@dataclass(frozen=True)
class TokenNames:
    """A tokenizer that names its tokens; `added` counts those it puts around a caption."""

    name: str
    split: Callable[[str], list[str]]
    added: int

    def __call__(self, caption: str) -> list[str]:
        """Tokens of a caption without those around it."""
        return self.split(caption[:MAX_LETTERS])


def _split_by_open_clip(tokenizer: SimpleTokenizer, text: str) -> list[str]:
    return [tokenizer.decoder[number] for number in tokenizer.encode(text)]


def open_token_names(name: str) -> TokenNames:
    """The tokenizer `clip`, that of an open_clip model, or a Hugging Face one (folder or name).

    Raises:
        ShardError: there is none of this name.
    """
    from transformers import AutoTokenizer

    if name == "clip":
        return TokenNames(name, partial(_split_by_open_clip, SimpleTokenizer()), 2)
    try:
        if name in open_clip.list_models():
            found: Any = open_clip.get_tokenizer(name)
            if isinstance(found, SimpleTokenizer):
                return TokenNames(name, partial(_split_by_open_clip, found), 2)
            if not isinstance(found, HFTokenizer):
                raise ShardError(f"tokenizer '{name}' cannot name its tokens: choose another one")
            found = found.tokenizer
        else:
            found = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, ShardError):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise ShardError(
            f"tokenizer '{name}' cannot be opened: use clip, a model name of open_clip, or a folder"
            f" with a Hugging Face tokenizer ({reason})"
        ) from error
    own = cast(Any, found)
    return TokenNames(name, own.tokenize, own.num_special_tokens_to_add())

"""A text tower that knows words and not their order, for small sets of short captions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BagOfWords(nn.Module):
    """Mean of the embeddings of a caption's word pieces, LayerNorm, linear projection.

    Texts are int64 (B, L) of the CLIP tokenizer: start mark, pieces, end mark (the largest id),
    padding; only the pieces count. How much a word says is the length of its embedding, and words
    that training never met stay short, so captions made of known words in new company come out
    near those that share them. That is what sets of a few thousand captions can teach; a
    transformer learns the captions by heart instead (docs/results.md).

    Args:
        vocab_size: entries of the tokenizer.
        width: of the embeddings.
        embed_dim: of the joint space.
        context_length: tokens per caption, L.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(self, vocab_size: int, width: int, embed_dim: int, context_length: int) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "width": width, "embed_dim": embed_dim}
        for name, value in (sizes | {"context_length": context_length}).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.vocab_size, self.context_length = vocab_size, context_length
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_projection, std=width**-0.5)

    def forward(self, text: Tensor) -> Tensor:
        """Texts (B, L) to features (B, embed_dim)."""
        place = torch.arange(text.shape[1], device=text.device)
        inside = (place > 0) & (place < text.argmax(-1, keepdim=True))
        pieces = self.token_embedding(text) * inside.unsqueeze(-1)
        mean = pieces.sum(1) / inside.sum(1, keepdim=True).clamp_min(1)
        return self.ln_final(mean) @ self.text_projection

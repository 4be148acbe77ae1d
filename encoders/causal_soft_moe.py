"""Soft MoE for causal sequences: what a position's slots average ends with that position.

Soft MoE (Puigcerver et al., arXiv 2308.00951) averages all tokens into each slot, so a later token
would change an earlier output; the paper leaves auto-regressive decoders open (section 6). Here the
dispatch softmax of position t runs over positions up to t only, and t combines outputs of its own
slots. As a slot's logit does not depend on t, a prefix average follows from the previous one: the
same recurrence serves long sequences, in chunks, and decoding, position by position.

Shape legend: B sequences, L positions, d width, E experts, P slots per expert, S = E * P slots,
n block size, C positions of a chunk, K blocks of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from encoders.routed_layer import ExpertOptions, check_padding_mask
from encoders.soft_moe import SlotLayer

# Positions whose dispatch weights are held at a time, (S, K, C) numbers per sequence: no more than
# the slots themselves take, (S, K, d), for usual widths.
CHUNK = 128


class CausalState(NamedTuple):
    """What a layer has to remember of the positions so far.

    `mean` (B, S, d): the slots averaged over all positions so far, and `log_weight` (B, S): the
    logarithm of the sum of their unnormalised weights, both float32 or wider; exp(log_weight) and
    mean * exp(log_weight) would be denominator and numerator, which overflow. `outputs` (B, S, d):
    what the experts made of the current block's slots. `position`: how many positions there were.
    """

    mean: Tensor
    log_weight: Tensor
    outputs: Tensor
    position: int


class CausalSoftMoE(SlotLayer):
    """Soft MoE in place of the MLP of a causal transformer block: (B, L, d) to (B, L, d).

    Parameters, logits and precision are those of `encoders.soft_moe.SoftMoE`, and the tokens are
    averaged as they are. All softmaxes run on differences to a maximum, so any scale is safe.

    With block size n, positions t of a block k * n ... k * n + n - 1 share slots that average the
    positions 0 ... k * n, that is all earlier blocks and the block's first position. So no output
    depends on a later position; n = 1 is the exact form, in which t's slots average 0 ... t.

    Cost: a block of n positions takes E * P expert calls, so a position costs E * P / n times a
    dense MLP of the same hidden width (`expert_flops_ratio`); memory is that of L * E * P / n slots
    of width d and as many hidden rows, far more than Soft MoE's E * P. Few experts, or blocks, make
    it affordable.

    Args:
        dim: token width d.
        num_experts: E.
        slots_per_expert: P.
        hidden_dim: hidden width of an expert, 4 * dim when None.
        block_size: n, the positions that share slots.
        **experts: further options of `RoutedLayer`.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        slots_per_expert: int = 1,
        hidden_dim: int | None = None,
        *,
        block_size: int = 1,
        **experts: Unpack[ExpertOptions],
    ) -> None:
        super().__init__(dim, num_experts, slots_per_expert, hidden_dim, **experts)
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size

    def expert_flops_ratio(self) -> float:
        """FLOPs of the experts per position over those of one dense MLP of their hidden width."""
        _, experts, slots = self.phi.shape
        return experts * slots / self.block_size

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Map positions (B, L, d) to (B, L, d) in the dtype of `x` (or of autocast).

        Args:
            x: the sequence from its first position on.
            padding_mask: bool (B, L), true where a position is padding: no slot averages it,
                whatever it contains, and its output is zero. Padding behind a sequence needs no
                mask, for no earlier position sees it.
        """
        if padding_mask is not None:
            check_padding_mask(padding_mask, x)
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0)
        state = self.initial_state(x)
        logits, length = self.logits(x), x.shape[1]
        size = max(1, CHUNK // self.block_size) * self.block_size
        starts = torch.arange(0, size, self.block_size, device=x.device)
        outputs = []
        for start in range(0, max(length, 1), size):  # an empty sequence is one empty chunk
            part = slice(start, start + size)
            chunk, scores = x[:, part], logits[:, part]
            hidden = None if padding_mask is None else padding_mask[:, part]
            blocks = -(-chunk.shape[1] // self.block_size)
            slots = self._average(chunk, scores, starts[:blocks], hidden, state)
            outputs.append(self._combine(scores, self._run_experts(slots)))
            if start + size < length:
                state = self._absorb(chunk, scores, hidden, state)
        y = torch.cat(outputs, 1)
        return y if padding_mask is None else y.masked_fill(padding_mask.unsqueeze(-1), 0)

    def initial_state(self, x: Tensor) -> CausalState:
        """The state before the first position of sequences like `x` (B, any, d)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = x.new_zeros(x.shape[0], self.phi[0].numel(), x.shape[2], dtype=wide)
        log_weight = mean.new_full(mean.shape[:2], torch.finfo(wide).min)
        return CausalState(mean, log_weight, mean, 0)

    def step(self, x: Tensor, state: CausalState) -> tuple[Tensor, CausalState]:
        """Decode one position: `x` (B, 1, d) and the state before it to its output and the next.

        Gives what `forward` gives at that position of the whole sequence.
        """
        logits = self.logits(x)
        after = self._absorb(x, logits, None, state)
        if state.position % self.block_size == 0:
            slots = after.mean.to(x.dtype).unsqueeze(2)
            after = after._replace(outputs=self._run_experts(slots)[:, 0])
        return self._combine(logits, after.outputs.unsqueeze(1)), after

    def _average(
        self, x: Tensor, logits: Tensor, ends: Tensor, padding: Tensor | None, state: CausalState
    ) -> Tensor:
        """Slots (B, S, K, d) over all positions up to each of the `ends` (K,), which count from 0
        in the chunk `x` (B, C, d); `state` is that before the chunk.

        A softmax over the chunk's positions and one more term, which stands for everything before
        the chunk with its whole weight. That term is never -inf: a row that has no position yet,
        because of padding, is zero and not NaN.
        """
        rows = len(ends)
        hidden = torch.arange(x.shape[1], device=x.device) > ends[:, None]
        if padding is not None:
            hidden = hidden | padding[:, None, None]
        with torch.autocast(x.device.type, enabled=False):
            scores = logits.transpose(1, 2).unsqueeze(2).expand(-1, -1, rows, -1)
            scores = scores.masked_fill(hidden, -torch.inf)
            before = state.log_weight[..., None, None].expand(-1, -1, rows, 1)
            old, new = torch.cat([before, scores], -1).softmax(-1).split([1, x.shape[1]], -1)
        means = (new.to(x.dtype).flatten(1, 2) @ x).unflatten(1, (logits.shape[2], rows))
        if state.position:
            means = means + (old * state.mean.unsqueeze(2)).to(means.dtype)
        return means

    def _absorb(
        self, x: Tensor, logits: Tensor, padding: Tensor | None, state: CausalState
    ) -> CausalState:
        """The state behind a chunk `x` (B, C, d), from that before it; the outputs stay."""
        with torch.autocast(x.device.type, enabled=False):
            last = torch.full((1,), x.shape[1] - 1, device=x.device)
            mean = self._average(x.to(logits.dtype), logits, last, padding, state)[:, :, 0]
            if padding is not None:
                lowest = torch.finfo(logits.dtype).min
                logits = logits.masked_fill(padding.unsqueeze(-1), lowest)
            log_weight = torch.logaddexp(state.log_weight, logits.logsumexp(1))
        return CausalState(mean, log_weight, state.outputs, state.position + x.shape[1])

    def _run_experts(self, slots: Tensor) -> Tensor:
        """Slots (B, S, K, d) to expert outputs (B, K, S, d)."""
        batch, _, blocks, dim = slots.shape
        _, experts, per_expert = self.phi.shape
        rows = slots.unflatten(1, (experts, per_expert)).transpose(0, 1)  # (E, B, P, K, d)
        outputs = self.experts(rows.reshape(experts, -1, dim))
        outputs = outputs.view(experts, batch, per_expert, blocks, dim)
        return outputs.permute(1, 3, 0, 2, 4).reshape(batch, blocks, experts * per_expert, dim)

    def _combine(self, logits: Tensor, outputs: Tensor) -> Tensor:
        """Logits (B, C, S) and each block's expert outputs (B, K, S, d) to (B, C, d)."""
        count, blocks = logits.shape[1], outputs.shape[1]
        weights = logits.softmax(-1).to(outputs.dtype)
        size = min(self.block_size, count) if blocks == 1 else self.block_size
        weights = F.pad(weights, (0, 0, 0, blocks * size - count))
        y = weights.unflatten(1, (blocks, size)) @ outputs
        return y.flatten(1, 2)[:, :count]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}"

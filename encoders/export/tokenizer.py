"""The tokenizer of a dual encoder as files that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, normalizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from encoders.export.model import DualEncoder

START, END = "<|startoftext|>", "<|endoftext|>"
# Part of how open_clip cleans texts before it reads them; transformers' CLIP tokenizer does not.
PLAIN = (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&amp;", "&"))
QUOTES = ((r"[\u02bc\u2018-\u201b]", "'"), (r"[\u201c-\u201f]", '"'))


def save_tokenizer(encoder: DualEncoder, folder: Path) -> None:
    """Write `tokenizer.json` and what goes with it."""
    export_tokenizer(encoder).save_pretrained(folder)


def export_tokenizer(encoder: DualEncoder) -> Any:
    """The tokenizer for transformers: the model's own, or that of the CLIP vocabulary."""
    if encoder.text_model is None:
        return clip_tokenizer(encoder.context_length)
    tokenizer = encoder.tokenizer.tokenizer
    tokenizer.model_max_length = encoder.context_length
    return tokenizer


def clip_tokenizer(context_length: int) -> PreTrainedTokenizerFast:
    """open_clip's byte-pair tokenizer for transformers.

    It pads with the end mark where open_clip pads with 0, which is also the token of "!"; the
    model makes one of the other. Ids are the same but for broken encodings and rare HTML entities,
    which open_clip repairs.

    Args:
        context_length: tokens per text, marks included.
    """
    source = SimpleTokenizer(context_length=context_length)
    marks = {"<start_of_text>": START, "<end_of_text>": END}
    vocabulary = {marks.get(token, token): number for token, number in source.encoder.items()}
    merges: Any = list(source.bpe_ranks)
    backend = CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
    steps = [normalizers.Replace(entity, plain) for entity, plain in PLAIN]
    steps += [normalizers.Replace(Regex(curly), plain) for curly, plain in QUOTES]
    backend.normalizer = normalizers.Sequence([*steps, backend.normalizer])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=context_length,
    )

"""The tokenizer of a dual encoder as files that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Regex, Tokenizer, normalizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from encoders.export.model import DualEncoder

START, END = "<|startoftext|>", "<|endoftext|>"
# Part of how open_clip cleans texts before it reads them; tokenizers of transformers do not.
PLAIN = (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&#39;", "'"), ("&amp;", "&"))
QUOTES = ((r"[\u02bc\u2018-\u201b]", "'"), (r"[\u201c-\u201f]", '"'))


def save_tokenizer(encoder: DualEncoder, folder: Path) -> None:
    """Write `tokenizer.json` and what goes with it."""
    export_tokenizer(encoder).save_pretrained(folder)


def export_tokenizer(encoder: DualEncoder) -> PreTrainedTokenizerFast:
    """The tokenizer for transformers: the model's own, or that of the CLIP vocabulary.

    It cleans texts as open_clip does before they get to either of them.
    """
    if encoder.text_model is None:
        return clip_tokenizer(encoder.context_length)
    own = encoder.tokenizer.tokenizer
    backend = Tokenizer.from_str(own.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    spaces = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    steps = [*_cleaning(), *spaces, *([backend.normalizer] if backend.normalizer else [])]
    backend.normalizer = normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=encoder.context_length,
        **own.special_tokens_map,
    )


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
    backend.normalizer = normalizers.Sequence([*_cleaning(), backend.normalizer])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=context_length,
    )


def _cleaning() -> list[normalizers.Normalizer]:
    return [
        *(normalizers.Replace(entity, plain) for entity, plain in PLAIN),
        *(normalizers.Replace(Regex(curly), plain) for curly, plain in QUOTES),
    ]

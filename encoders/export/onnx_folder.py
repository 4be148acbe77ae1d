"""Both towers as ONNX graphs, for runtimes without torch."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from encoders.export.model import DualEncoder, ExportError, save_json
from encoders.export.onnx_operators import translations
from encoders.export.tokenizer import save_tokenizer
from encoders.sparse_base import SparseMoE

LARGEST = 1 << 30  # bytes of weights in one file, of which protobuf holds less than 2 GiB
EXAMPLES = 2  # more than one, which torch takes for a constant
TOLERANCE = 1e-4


class _UnitEmbedding(nn.Module):
    """A tower that ends with embeddings of length 1."""

    def __init__(self, tower: Any) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, inputs: Tensor) -> Tensor:
        return F.normalize(self.tower(inputs), dim=-1)


def write_onnx(encoder: DualEncoder, folder: Path) -> None:
    """Write `image.onnx`, `text.onnx`, `onnx_config.json` and the tokenizer.

    `image.onnx` takes `pixel_values` float32 (B, 3, S, S), normalised, to `image_embeds` (B, D);
    `text.onnx` takes `input_ids` int64 (T, L), padded to L as the config says, to `text_embeds`
    (T, D). B and T are free, all embeddings have length 1. Layers that route several images
    together (`group_size`) route each alone, as they do for a batch of one. Both graphs are run
    and compared with the model before this function returns.

    Args:
        encoder: what to write, on the CPU.
        folder: exists, and is empty.

    Raises:
        ExportError: onnx is not installed; a tower has an operation that ONNX lacks, or depends
            on the size of the batch; or the graph computes something else.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise ExportError(
                f"--to onnx needs the {package} package: pip install 'softmoe-clip[export]'"
            )
    size = encoder.image_size
    images = torch.randn(EXAMPLES, 3, size, size, generator=torch.Generator().manual_seed(0))
    texts = encoder.tokenizer(["a photo of a dog", "two"][:EXAMPLES])
    write_tower(encoder.model.visual, images, "pixel_values", "image_embeds", folder / "image.onnx")
    write_tower(encoder.model.text, texts, "input_ids", "text_embeds", folder / "text.onnx")
    bias = encoder.model.logit_bias
    save_json(
        {
            "logit_scale": encoder.model.logit_scale.exp().item(),
            "logit_bias": None if bias is None else bias.item(),
            "scores": "sigmoid" if encoder.sigmoid else "softmax",
            "image_size": size,
            "context_length": encoder.context_length,
            "pad_id": 0 if encoder.text_model is None else encoder.model.text.config.pad_token_id,
            "preprocess": encoder.preprocess,
        },
        folder / "onnx_config.json",
    )
    save_tokenizer(encoder, folder)


def write_tower(tower: Any, example: Tensor, name: str, output: str, path: Path) -> None:
    """Write a tower whose embeddings get length 1 as one graph, and compare it with the tower.

    Args:
        tower: maps a batch of inputs to a batch of embeddings.
        example: two inputs.
        name: of the graph's input.
        output: name of its output.
        path: file to write.

    Raises:
        ExportError: see `write_onnx`.
    """
    module = _UnitEmbedding(copy.deepcopy(tower)).eval()
    for part in module.modules():
        if isinstance(part, SparseMoE):
            part.group_size = 1
    try:
        with torch.no_grad(), _quiet():
            torch.onnx.export(
                module,
                (example,),
                path,
                input_names=[name],
                output_names=[output],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                custom_translation_table=translations(),
                external_data=_bytes(module) > LARGEST,
                verbose=False,
            )
    except Exception as error:  # of many kinds, for there is no one place where it can stop
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(f"{path.name} cannot be made: torch.onnx says '{reason}'") from error
    _compare(module, example, path)


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


@torch.no_grad()
def _compare(module: nn.Module, example: Tensor, path: Path) -> None:
    """Raise ExportError unless the graph agrees with the module for batches of other sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    for size in (1, len(example), 3):
        rows = example[torch.arange(size) % len(example)]
        (found,) = session.run(None, {name: rows.numpy()})
        difference = (torch.from_numpy(found) - module(rows)).abs().max().item()
        if not difference <= TOLERANCE:
            raise ExportError(
                f"{path.name} differs from the model by {difference:.2g} for a batch of {size}"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and its warnings about its own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

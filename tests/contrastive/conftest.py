"""What several tests of initial weights start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForPreTraining, BertTokenizerFast

from tests.contrastive.weight_runs import (
    WORDS,
    bert_config,
    classification_run,
    contrastive_run,
)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run directory with one classification checkpoint, and its weights."""
    run_dir = classification_run(tmp_path_factory.mktemp("classifier"))
    return run_dir, load_file(run_dir / "checkpoints/step_00000007/model.safetensors")


@pytest.fixture(scope="module")
def dual_encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run directory with one contrastive checkpoint, and its weights."""
    run_dir = contrastive_run(tmp_path_factory.mktemp("dual_encoder"))
    return run_dir, load_file(run_dir / "checkpoints/step_00000007/open_clip_model.safetensors")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with its heads of pretraining, in half precision, and a tokenizer."""
    root = tmp_path_factory.mktemp("text")
    (root / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast(vocab=str(root / "words.txt")).save_pretrained(root / "bert")
    torch.manual_seed(1)
    BertForPreTraining(bert_config()).half().save_pretrained(root / "bert")
    return root / "bert"

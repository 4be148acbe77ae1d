"""What is exported, made once for all workers of a test run, and the wheel that opens it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor
from transformers import BertConfig, BertTokenizerFast

from data_pipelines.decode import decode_rgb
from data_pipelines.transforms import eval_transform
from encoders.clip_model import build_clip, vision_config
from encoders.hugging_face_text import hugging_face_text_config
from encoders.text_towers import build_tokenizer, open_clip_text_config, route_text_blocks
from scripts import export, train_contrastive

ROOT = Path(__file__).parents[2]
TEST = "soft_moe_vit_test_patch16_64"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "square"]
WORDS += [
    "it",
    "s",
    "'",
    '"',
    "&",
    "<",
    ">",
    "!",
    "?",
    ",",
    "photo",
    "of",
    "salt",
    "pepper",
    "very",
]
TEXTS = [
    "a red square",
    "Green & <blue>!?",
    "it\u2019s \u201ca\u201d photo of 12 dogs,  isn't it",
    "",
    "salt &amp;  pepper &quot;of&quot; a\u00a0photo &lt;square&gt; ",
]
TEXTS += [f"{'very ' * count}long caption number {count}" for count in range(45)]


def checkpoint(folder: Path, text: dict[str, Any], arguments: dict[str, Any], **more: Any) -> Path:
    """A folder as scripts.train_contrastive leaves one, with weights that nothing draws alike."""
    config = {"embed_dim": 8, "vision_cfg": vision_config(TEST, arguments), "text_cfg": text}
    config |= {"custom_text": True, **more}
    torch.manual_seed(1)
    model: Any = build_clip(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.4, 0.5, 0.6], "std": [0.5, 0.4, 0.3],
        "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return folder


def sigmoid_checkpoint(folder: Path) -> Path:
    """Sigmoid loss, routed blocks in both towers, positions that no checkpoint holds."""
    text = route_text_blocks(open_clip_text_config(16, 2, 2, 12), 1, 2)
    arguments = {"router": "experts_choice", "num_experts": 2, "img_size": 48}
    arguments["pos_embed"] = "sincos2d"
    return checkpoint(folder, text, arguments, init_logit_bias=-3.0)


def bert_checkpoint(folder: Path) -> Path:
    """A tiny BERT as text tower, with its config and tokenizer in the folder."""
    bert = folder.with_name("bert")
    bert.mkdir(parents=True)
    (bert / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast(vocab=str(bert / "vocab.txt")).save_pretrained(bert)
    BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12,
    ).save_pretrained(bert)  # fmt: skip
    described = json.loads((bert / "config.json").read_text())
    del described["pad_token_id"]  # as many on the hub, which leave out what is usual
    (bert / "config.json").write_text(json.dumps(described))
    text = hugging_face_text_config(bert, 8, pretrained=False)
    checkpoint(folder, text, {})
    build_tokenizer(text).save_pretrained(folder)
    (folder / "text").mkdir()
    shutil.move(bert / "config.json", folder / "text" / "config.json")
    shutil.rmtree(bert)  # nothing may look for it
    return folder


def pictures(folder: Path, count: int = 3) -> list[Path]:
    """Pictures of other shapes than the model's."""
    noise = np.random.default_rng(0)
    paths = []
    for number in range(count):
        pixels = noise.integers(0, 255, (70 + 20 * number, 90, 3)).astype(np.uint8)
        paths.append(folder / f"picture{number}.png")
        Image.fromarray(pixels).resize((90, 120)).save(paths[-1])
    return paths


def expectations(model: Any, tokenizer: Any, files: list[Path], folder: Path) -> None:
    """What every export of the model has to give for the pictures and `TEXTS`."""
    size = model.visual.image_size[0]
    preprocess = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    transform = eval_transform(size)
    mean, std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
    decoded = torch.stack([transform(decode_rgb(path.read_bytes())) for path in files])
    pixels: Tensor = (decoded / 255 - mean) / std
    resized = [
        np.asarray(Image.open(path).resize((size, size), Image.Resampling.BICUBIC))
        for path in files
    ]
    pillow = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    tokens = tokenizer(TEXTS)
    with torch.no_grad():
        tensors = {
            "pixels": pixels,
            "pillow": (pillow / 255 - mean) / std,  # open_clip and timm resize with Pillow
            "tokens": tokens,
            "image": model.encode_image(pixels),
            "pooled": model.visual.trunk(pixels),
            "text": model.encode_text(tokens),
            "scale": model.logit_scale.exp(),
        }
        if model.logit_bias is not None:
            tensors["bias"] = model.logit_bias
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "expected")


TARGETS = {
    "clip": ("open_clip", "timm", "transformers"),
    "sigmoid": ("timm", "transformers", "sentence-transformers"),
    "bert": ("open_clip", "transformers", "sentence-transformers", "onnx"),
}


@pytest.fixture(scope="session")
def exports(make_once: Callable[..., Path], shards: Path) -> Path:
    """Folder `<model>/<target>` of exports, `<model>/source` of checkpoints with what they give."""
    from eval.open_model import open_model

    def fill(folder: Path) -> None:
        files = pictures(folder)
        (folder / "texts.json").write_text(json.dumps(TEXTS))
        evaluation = {
            "name": "own", "shards": f"{shards}/train-*.tar", "classnames":
            f"{shards}/classnames.txt",
        }  # fmt: skip
        run = folder / "clip" / "run"
        train_contrastive.main([
            f"--run_dir={run}", f"--data.shards={shards}/train-*.tar", "--data.workers=0",
            "--train.steps=2", "--train.batch_size=8", "--train.threads=1", f"--image.name={TEST}",
            "--contrastive.embed_dim=8", "--text.width=16", "--text.heads=2", "--text.layers=2",
            "--text.context_length=12", f"--evaluation={json.dumps([evaluation])}",
        ])  # fmt: skip
        shutil.copytree(run / "checkpoints" / "step_00000002", folder / "clip" / "source")
        sigmoid_checkpoint(folder / "sigmoid" / "source")
        bert_checkpoint(folder / "bert" / "source")
        classifier: Any = timm.create_model(TEST, num_classes=4)
        save_for_hf(classifier, folder / "classifier" / "source", safe_serialization=True)
        pixels = {"pixels": torch.randn(2, 3, 64, 64)}
        with torch.no_grad():
            pixels["logits"] = classifier.eval()(pixels["pixels"])
        save_file(pixels, folder / "classifier" / "source" / "expected")
        place = folder / "classifier"
        export.main([str(place / "source"), "--to=timm", f"--out={place / 'timm'}"])
        for name, targets in TARGETS.items():
            place = folder / name / "source"
            opened = open_model(str(place))
            expectations(opened.model, opened.tokenizer, files, place)
            given = run if name == "clip" else place
            for target in targets:
                export.main([str(given), f"--to={target}", f"--out={folder / name / target}"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        folder = make_once("exports", fill)
        AcceleratorState._reset_state(reset_partial_state=True)
    return folder


@pytest.fixture(scope="session")
def run_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run a program of this folder in a fresh process, in another folder, offline."""

    def run(name: str, *arguments: Path, site: Path | None) -> dict[str, Any]:
        here = tmp_path_factory.mktemp("elsewhere")
        path = {} if site is None else {"PYTHONPATH": str(site)}
        result = subprocess.run(
            [sys.executable, Path(__file__).with_name(name), ROOT, *arguments],
            cwd=here,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
            | {"HF_HOME": str(here / "hub"), "TOKENIZERS_PARALLELISM": "false", **path},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        (told,) = [line for line in result.stdout.splitlines() if line.startswith("{")]
        return json.loads(told) | {"stderr": result.stderr}

    return run

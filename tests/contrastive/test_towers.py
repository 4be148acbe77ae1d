"""Towers that are frozen or trained in part: what gets a gradient, a graph, decay and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, frozen_parts, model_config
from contrastive.objective import ContrastiveObjective
from contrastive.trainable import parts_to_freeze
from training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from training.loop import Trainer
from training.objective import split_batch

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT of two layers with dropout and a tokenizer."""
    root = tmp_path_factory.mktemp("text")
    (root / "words.txt").write_text("\n".join(WORDS), encoding="utf-8")
    BertTokenizerFast(vocab=str(root / "words.txt")).save_pretrained(root / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=12, hidden_dropout_prob=0.3,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(root / "bert")
    return root / "bert"


def make_objective(
    folder: Path, image: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> ContrastiveObjective:
    torch.manual_seed(0)
    image_config = ImageTowerConfig(TEST, init_from="loaded elsewhere", **image or {})
    chosen = {"kind": "hugging_face", "folder": str(folder), "context_length": 6} | (text or {})
    text_config = TextTowerConfig(**chosen)
    config = ContrastiveConfig(embed_dim=8)
    description = model_config(image_config, text_config, config)
    model = build_dual_encoder(description)
    frozen = frozen_parts(model, image_config, text_config)
    return ContrastiveObjective(model, description, config, HALF, HALF, frozen)


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, len(WORDS), (4, 6), generator=generator),
    }


class Batches:
    """An endless stream of `make_batch`."""

    def __len__(self) -> int:
        return 4

    def identity(self) -> dict[str, Any]:
        return {}

    def batches(self, start_step: int = 0) -> Any:
        while True:
            yield make_batch(start_step)
            start_step += 1


TRUNK, BERT = "visual.trunk.", "text.transformer."
# open_clip's text tower, whose projection is a parameter among its others.
CLIP: dict[str, Any] = {
    "kind": "open_clip", "folder": "", "init_from": "loaded elsewhere", "width": 16, "heads": 2,
    "layers": 2,
}  # fmt: skip
CLIP_BLOCK = "text.transformer.resblocks.1."
# Settings of the image and the text tower, and how the names of trained parameters begin, besides
# the projections and the logit scale.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "both trained": ({}, {}, (TRUNK, BERT)),
    "frozen image": ({"frozen": True}, {}, (BERT,)),
    "frozen text": ({}, {"frozen": True}, (TRUNK,)),
    "last block of image": ({"trainable": 1}, {}, (f"{TRUNK}blocks.1.", f"{TRUNK}norm.", BERT)),
    "last block of text": ({}, {"trainable": 1}, (TRUNK, f"{BERT}encoder.layer.1.")),
    "patterns": (
        {"trainable": [r"pos_embed", r"blocks\.\d+\.mlp\..*phi"]},
        {"trainable": [r".*LayerNorm.*"]},
        (
            f"{TRUNK}pos_embed",
            f"{TRUNK}blocks.1.mlp.phi",
            f"{BERT}embeddings.LayerNorm",
            *(f"{BERT}encoder.layer.{n}.output.LayerNorm" for n in (0, 1)),
            *(f"{BERT}encoder.layer.{n}.attention.output.LayerNorm" for n in (0, 1)),
        ),
    ),
    "frozen text of open_clip": ({}, CLIP | {"frozen": True}, (TRUNK,)),
    "last block of open_clip's text": (
        {}, CLIP | {"trainable": 1}, (TRUNK, CLIP_BLOCK, "text.ln_final."),
    ),
    "patterns in open_clip's text": (
        {"frozen": True},
        CLIP | {"trainable": ["positional_embedding", r".*resblocks\.\d\.ln_\d\.bias"]},
        (
            "text.positional_embedding",
            *(f"text.transformer.resblocks.{n}.ln_{m}.bias" for n in (0, 1) for m in (1, 2)),
        ),
    ),
}  # fmt: skip
ALWAYS = ("visual.head.", "text.proj.", "text.text_projection", "logit_scale")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_trained_and_what_is_not(
    folder: Path, tmp_path: Path, name: str, accumulation: int
) -> None:
    image, text, starts = CASES[name]
    objective = make_objective(folder, image, text)
    model = objective.model
    names = [parameter for parameter, _ in model.named_parameters()]
    trained = {parameter for parameter in names if parameter.startswith((*starts, *ALWAYS))}
    missed = [start for start in starts if not any(n.startswith(start) for n in trained)]
    assert not missed
    assert len([n for n in trained if n.startswith(ALWAYS)]) == 3
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = Trainer(
        objective, Batches(), (),
        TrainConfig(steps=2, batch_size=4, accumulation=accumulation),
        OptimizerConfig(lr=0.01, weight_decay=0.5), ScheduleConfig("constant"),
        Accelerator(cpu=True), tmp_path,
    )  # fmt: skip
    trainer.fit()
    states = {n for n, p in model.named_parameters() if p in trainer.optimizer.state}
    assert states == trained
    for key, value in before.items():
        if key not in trained:
            assert torch.equal(model.state_dict()[key], value), key
    moved = {n for n in trained if not torch.equal(model.state_dict()[n], before[n])}
    # A key's bias cancels in a softmax over keys, so it moves by rounding only or not at all.
    assert {n for n in trained if not n.endswith("key.bias")} <= moved


@pytest.mark.parametrize("name", CASES)
def test_modules_without_a_trained_parameter_stay_in_eval_mode(folder: Path, name: str) -> None:
    image, text, _ = CASES[name]
    objective = make_objective(folder, image, text).eval().train()
    for path, module in objective.model.named_modules():
        parameters = list(module.parameters())
        if parameters:
            assert module.training == any(p.requires_grad for p in parameters), path
    if text.get("kind") != "open_clip":
        layer = objective.model.text.transformer.encoder.layer[0]
        quiet = name in ("frozen text", "last block of text")
        assert layer.output.dropout.training != quiet


@pytest.mark.parametrize("text", [{}, CLIP])
def test_a_frozen_tower_keeps_no_graph(folder: Path, text: dict[str, Any]) -> None:
    """Of the towers, only what the projections need is kept: the features before them."""
    objective = make_objective(folder, {"frozen": True}, text | {"frozen": True})
    model, batch = objective.model, make_batch()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        features = model.visual.trunk(objective.normalize(batch["image"]))
        assert not features.requires_grad
        assert saved == []
        model.encode_text(batch["text"])
    assert [tuple(tensor.shape) for tensor in saved] == [(4, 16)]  # the pooled features


def test_a_trained_last_block_keeps_no_graph_below(folder: Path) -> None:
    trunk = make_objective(folder, {"trainable": 1}).model.visual.trunk
    outputs: list[Tensor] = []
    for block in trunk.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    trunk(torch.zeros(2, 3, 64, 64))
    assert [output.requires_grad for output in outputs] == [False, True]


@pytest.mark.parametrize(
    ("image", "text", "message"),
    [
        ({"trainable": 3}, {}, r"image\.trainable must be 1 to 2, the number of blocks, got 3"),
        ({}, {"trainable": 0}, r"text\.trainable must be 1 to 2.*to train nothing set frozen"),
        ({"trainable": [r"blocks\.1\..*", "mlp"]}, {}, r"image\.trainable 'mlp' matches no"),
        ({}, {"trainable": ["("]}, r"text\.trainable '\('"),
        ({"trainable": []}, {}, r"image\.trainable is an empty list"),
        ({"trainable": 1, "frozen": True}, {}, r"image\.frozen trains nothing, image\.trainable 1"),
        ({"trainable": 1, "init_from": None}, {}, r"image\.trainable would keep random weights"),
        ({}, {"trainable": 1, "kind": "open_clip"}, r"text\.trainable would keep random weights"),
    ],
)
def test_impossible_choices_are_refused(
    folder: Path, image: dict[str, Any], text: dict[str, Any], message: str
) -> None:
    images = ImageTowerConfig(**{"name": TEST, "init_from": "x"} | image)
    texts = TextTowerConfig(
        **{"kind": "hugging_face", "folder": str(folder), "context_length": 6} | text
    )

    def build() -> None:
        model = build_dual_encoder(model_config(images, texts, ContrastiveConfig(embed_dim=8)))
        frozen_parts(model, images, texts)

    with pytest.raises(ValueError, match=message):
        build()


def test_blocks_of_other_timm_towers() -> None:
    convnext = timm.create_model("test_convnext", num_classes=0)
    frozen = parts_to_freeze(convnext, 1, "image.trainable")
    assert isinstance(frozen[0], nn.Module)
    stages: Any = convnext.stages
    assert frozen == (convnext.stem, *list(stages)[:-1])
    with pytest.raises(ValueError, match="no list of blocks; name parameters"):
        parts_to_freeze(timm.create_model("test_resnet", num_classes=0), 1, "image.trainable")


@pytest.mark.parametrize("name", list(CASES)[:5])
def test_a_frozen_tower_runs_once_for_each_part(folder: Path, name: str) -> None:
    image, text, _ = CASES[name]
    objective = make_objective(folder, image, text)
    calls = dict.fromkeys(("image", "text"), 0)
    towers = {"image": objective.model.visual.trunk, "text": objective.model.text.transformer}
    for side, tower in towers.items():
        tower.eval()  # without noise, which parts would draw in another order

        def count(*_: Any, side: str = side) -> None:
            calls[side] += 1

        tower.register_forward_hook(count)
    objective.wants_details = True
    gradients = []
    for parts in (1, 2):
        for side in calls:
            calls[side] = 0
        for loss, metrics in objective.part_losses(objective, split_batch(make_batch(), parts)):
            (loss / parts).backward()
            assert "routing/blocks.1/combine_max" in metrics
            assert all(value.isfinite() for value in metrics.values())
        gradients.append({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})
        objective.zero_grad()
    for side, settings in (("image", image), ("text", text)):
        assert calls[side] == (2 if settings.get("frozen") else 4), side
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)

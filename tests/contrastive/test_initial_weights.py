"""Initialising towers: what is loaded from where, what is said about it, and what is refused."""

from __future__ import annotations

import json
import math
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizerFast

from classification.config import ClassifierConfig
from classification.objective import ClassificationObjective, build_classifier
from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, frozen_parts, model_config
from contrastive.initial_weights import initialise_towers
from contrastive.objective import ContrastiveObjective
from training.checkpoint import CheckpointError, CheckpointWriter

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)
ARGUMENTS = {"router": "experts_choice", "num_experts": 2, "img_size": 48}
TINY: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "context_length": 8}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple"]


def start(
    image: dict[str, Any] | None = None, text: dict[str, Any] | None = None, embed_dim: int = 8
) -> tuple[Any, list[str]]:
    """A model that starts as the settings say, with what the log says about it."""
    torch.manual_seed(0)
    images, texts = ImageTowerConfig(**{"name": TEST} | (image or {})), TextTowerConfig(
        **(text or TINY)
    )  # fmt: skip
    config = model_config(images, texts, ContrastiveConfig(embed_dim=embed_dim))
    model = build_dual_encoder(config)
    lines = initialise_towers(model, images, texts, config)
    frozen_parts(model, images, texts)
    return model, lines


def refused(message: str, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        start(**settings)
    assert "\n" not in str(error.value)


def publish(objective: Any, run_dir: Path) -> Path:
    """A run directory with one checkpoint, as the training loop leaves it."""
    writer = CheckpointWriter(run_dir / "checkpoints", 7)
    writer.begin()
    writer.add_tensors(objective.weights_file, objective.model.state_dict())
    for name, content in objective.config_files().items():
        writer.add_json(name, content)
    writer.publish(7)
    return run_dir


def classification_run(run_dir: Path, **arguments: Any) -> Path:
    torch.manual_seed(5)
    config = ClassifierConfig(TEST, arguments=arguments)
    return publish(ClassificationObjective(build_classifier(config, 3), config, 3), run_dir)


def contrastive_run(
    run_dir: Path, text: dict[str, Any] | None = None, **arguments: Any
) -> Path:  # fmt: skip
    torch.manual_seed(5)
    config = ContrastiveConfig(embed_dim=8)
    images = ImageTowerConfig(TEST, arguments=arguments)
    described = model_config(images, TextTowerConfig(**(text or TINY)), config)
    model = build_dual_encoder(described)
    return publish(ContrastiveObjective(model, described, config, HALF, HALF), run_dir)


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


def bert_config(**changes: Any) -> BertConfig:
    sizes = {
        "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 12,
    }  # fmt: skip
    return BertConfig(**sizes | changes)


def hugging_face(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"kind": "hugging_face", "folder": str(folder), "context_length": 6} | changes


def assert_equal(module: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def inside(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize(
    "place", ["", "checkpoints/step_00000007", "checkpoints/step_00000007/model.safetensors"]
)
def test_a_classifier_gives_its_trunk(
    classifier: tuple[Path, dict[str, Tensor]], place: str
) -> None:
    run_dir, weights = classifier
    model, (image, text) = start({"init_from": str(run_dir / place), "frozen": True})
    assert_equal(model.visual.trunk, {n: v for n, v in weights.items() if n[:5] != "head."})
    checkpoint = run_dir / "checkpoints/step_00000007"
    assert re.fullmatch(
        rf"image tower: {len(weights) - 2} tensors from {checkpoint}\S* match;"
        r" random: head\.proj\.weight; left out: trunk\.head\.bias, trunk\.head\.weight",
        image,
    )
    assert text == "text tower: random weights"


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "levit_128s"])
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_any_timm_export_gives_its_trunk(tmp_path: Path, name: str, prefix: str) -> None:
    # Classifiers fc; head.fc, beside a norm that stays; head.linear and head_dist.linear, beside
    # norms that go.
    classifier = timm.create_model(name, num_classes=3)
    save_for_hf(classifier, str(tmp_path), safe_serialization=True)
    weights = classifier.state_dict()
    model, (line, _) = start({"name": name, "init_from": f"{prefix}{tmp_path}"})
    trunk = model.visual.trunk.state_dict()
    assert 0 < len(trunk) < len(weights)
    assert all(torch.equal(value, weights[key]) for key, value in trunk.items())
    assert f"image tower: {len(trunk)} tensors from {tmp_path} match" in line


def test_an_export_with_arguments_says_which(tmp_path: Path) -> None:
    """timm notes the usual image size and more, too."""
    usual, unusual = tmp_path / "usual", tmp_path / "unusual"
    save_for_hf(timm.create_model(TEST, num_classes=3), str(usual), safe_serialization=True)
    other = timm.create_model(TEST, num_classes=3, **ARGUMENTS)
    save_for_hf(other, str(unusual), safe_serialization=True)
    start({"init_from": str(usual)})
    start({"init_from": str(usual), "arguments": {"img_size": 64}})
    start({"init_from": str(unusual), "arguments": ARGUMENTS})
    refused(r'img_size": 48.*write --image\.arguments \'\{', image={"init_from": str(unusual)})


def test_a_name_of_the_hub_is_found_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dual_encoder: tuple[Path, Any]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    classifier = timm.create_model("test_vit", num_classes=3)
    folder = tmp_path / "models--someone--vit" / "snapshots" / "0123abcd"
    save_for_hf(classifier, str(folder), safe_serialization=True)
    clip = tmp_path / "models--someone--clip" / "snapshots" / "0123abcd"
    checkpoint = dual_encoder[0] / "checkpoints/step_00000007"
    clip.mkdir(parents=True)
    for file in checkpoint.glob("open_clip*"):
        (clip / file.name).write_bytes(file.read_bytes())
    for name in ("vit", "clip"):
        refs = tmp_path / f"models--someone--{name}" / "refs"
        refs.mkdir()
        (refs / "main").write_text("0123abcd")
    vit = {"name": "test_vit", "init_from": "hf-hub:someone/vit"}
    model, _ = start(vit | {"pooling": "token"})
    images = torch.rand(2, 3, 160, 160)
    expected = classifier.eval().forward_head(classifier.forward_features(images), pre_logits=True)
    assert torch.equal(model.eval().visual.trunk(images), expected)
    refused("pools its tokens by 'token', the tower here by 'avg': set image.pooling", image=vit)
    both = {"init_from": "hf-hub:someone/clip"}
    model, lines = start(both, TINY | both)
    assert_equal(model.text, inside(dual_encoder[1], "text."))
    assert all("tensors from" in line for line in lines)
    refused("'someone/none' is no folder here", image={"init_from": "hf-hub:someone/none"})


def test_weights_of_other_pixels_are_refused(tmp_path: Path) -> None:
    classifier = timm.create_model(TEST, num_classes=3)
    classifier.pretrained_cfg = {**classifier.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    save_for_hf(classifier, str(tmp_path), safe_serialization=True)
    refused(
        r"trained with pixel mean \[0.1, 0.2, 0.3\], the model here has \[0.5, 0.5, 0.5\]",
        image={"init_from": str(tmp_path)},
    )


def test_a_pooling_without_its_parts_is_refused() -> None:
    refused(f"{TEST} cannot pool by 'token': choose another image.poo", image={"pooling": "token"})
    refused(f"{TEST} cannot pool by 'map'", image={"pooling": "map", "arguments": {"img_size": 32}})


def test_a_dual_encoder_gives_its_towers(dual_encoder: tuple[Path, dict[str, Tensor]]) -> None:
    run_dir, weights = dual_encoder
    source = {"init_from": str(run_dir)}
    model, lines = start(source, TINY | source | {"frozen": True})
    for tower in ("visual", "text"):
        assert_equal(model.get_submodule(tower), inside(weights, f"{tower}."))
    counts = [len(inside(weights, f"{tower}.")) for tower in ("visual", "text")]
    checkpoint = run_dir / "checkpoints/step_00000007"
    assert lines == [
        f"image tower: {counts[0]} tensors from {checkpoint} match",
        f"text tower: {counts[1]} tensors from {checkpoint} match",
    ]
    assert float(model.logit_scale.detach()) == pytest.approx(math.log(1 / 0.07))


def test_a_file_of_weights_is_enough(
    dual_encoder: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    save_file(dual_encoder[1], tmp_path / "weights.safetensors")
    source = {"init_from": str(tmp_path / "weights.safetensors")}
    model, _ = start(source, TINY | source)
    assert_equal(model.visual, inside(dual_encoder[1], "visual."))
    assert_equal(model.text, inside(dual_encoder[1], "text."))


@pytest.mark.parametrize("custom_text", [False, True])
def test_an_export_of_open_clip_gives_its_text_tower(
    tmp_path: Path, bert: Path, custom_text: bool
) -> None:
    """The class CLIP keeps the text tower at the root, CustomTextCLIP does not."""
    description = {
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 64},
        "text_cfg": TINY | {"vocab_size": 49408},
    }
    torch.manual_seed(3)
    kind: Any = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    theirs = kind(**description)
    export: Any = import_module("open_clip.push_to_hf_hub")
    open_clip.set_model_preprocess_cfg(theirs, {"mean": HALF, "std": HALF})
    # Its own CLIP tokenizer is the one that it cannot save.
    tokenizer = open_clip.tokenizer.HFTokenizer(str(bert))
    export.save_for_hf(theirs, tokenizer, description, tmp_path, safe_serialization=True)
    ours, (_, line) = start(text=TINY | {"init_from": str(tmp_path), "frozen": True})
    assert line.startswith("text tower: 29 tensors from ")
    tokens = torch.randint(1, 49000, (2, 8))
    with torch.no_grad():
        assert torch.equal(ours.encode_text(tokens), theirs.encode_text(tokens))
    refused("is open_clip's own, towers here are timm's", image={"init_from": str(tmp_path)})
    description["quick_gelu"] = True
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": description}))
    settings = TINY | {"init_from": str(tmp_path)}
    refused(r"has quick_gelu true, .* false: set text\.quick_gelu", text=settings)
    quick, _ = start(text=settings | {"quick_gelu": True})
    theirs = kind(**description)
    theirs.load_state_dict(load_file(tmp_path / "open_clip_model.safetensors"))
    with torch.no_grad():
        assert torch.equal(quick.encode_text(tokens), theirs.encode_text(tokens))


def test_a_folder_of_transformers_gives_all_but_its_heads(bert: Path) -> None:
    model, (_, line) = start(text=hugging_face(bert, frozen=True))
    saved = load_file(bert / "model.safetensors")
    expected = {n: v for n, v in inside(saved, "bert.").items() if not n.startswith("pooler.")}
    assert_equal(model.text.transformer, {n: v.float() for n, v in expected.items()})
    assert {p.dtype for p in model.text.parameters()} == {torch.float32}
    assert re.fullmatch(
        rf"text tower: {len(expected)} tensors from {bert} match; random: proj\.weight; left out:"
        r" bert\.pooler\.dense\.bias, .* and \d more",
        line,
    )


def test_a_hugging_face_tower_goes_from_run_to_run(bert: Path, tmp_path: Path) -> None:
    run_dir = contrastive_run(tmp_path / "run", hugging_face(bert))
    weights = load_file(run_dir / "checkpoints/step_00000007/open_clip_model.safetensors")
    source = hugging_face(bert, init_from=str(run_dir))
    model, (_, line) = start(text=source)
    assert_equal(model.text, inside(weights, "text."))
    assert "random" not in line
    refused(r"has hf_pooler_type .* set text\.pooling", text=source | {"pooling": "cls"})
    refused(r"is of text\.kind hugging_face", text=TINY | {"init_from": str(run_dir)})
    open_clips = contrastive_run(tmp_path / "other")
    refused(r"is of text\.kind open_clip", text=hugging_face(bert, init_from=str(open_clips)))
    assert "missing proj.weight" in _refusal(hugging_face(bert, init_from=_without_head(run_dir)))


def _without_head(run_dir: Path) -> str:
    path = run_dir / "checkpoints/step_00000007/open_clip_model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if n != "text.proj.weight"}, path)
    return str(path.parent)


def _refusal(text: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        start(text=text)
    return str(error.value)


def test_what_transformers_would_pass_over_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    BertModel(bert_config(num_hidden_layers=3), add_pooling_layer=False).save_pretrained(folder)
    for file in bert.glob("token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    for changes, problem in (
        ({"num_hidden_layers": 2}, r"unexpected transformer\.encoder\.layer\.2"),
        ({"num_hidden_layers": 4}, r"missing transformer\.encoder\.layer\.3"),
        ({"vocab_size": 9}, r"word_embeddings\.weight is \(8, 16\), expected \(9, 16\)"),
    ):
        bert_config(**{"num_hidden_layers": 3} | changes).save_pretrained(folder)
        refused(problem, text=hugging_face(folder))
    allow = [r"transformer\.embeddings\.word_embeddings\.weight"]
    _, (_, line) = start(text=hugging_face(folder, init_allow=allow))
    assert "allowed: transformer.embeddings.word_embeddings.weight is (8, 16)" in line


def test_weights_of_another_architecture_are_explained(
    classifier: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, weights = classifier
    other = timm.create_model(TEST, num_classes=3, embed_dim=16).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "blocks.1.mlp" not in name},
        tmp_path / "dense.safetensors",
    )
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    for place, problem in (
        ("other.safetensors", r"trunk\.pos_embed is \(1, 16, 16\), expected \(1, 16, 32\)"),
        ("dense.safetensors", r"missing trunk\.blocks\.1\.mlp\.phi"),
        ("dense.safetensors", r"match these names in image\.init_allow"),
        ("nowhere", "does not exist"),
        ("empty", "holds no complete checkpoint"),
        ("bare", r"has no model\.safetensors; only safetensors are read"),
    ):
        refused(problem, image={"init_from": str(tmp_path / place)})


def test_differences_are_allowed_by_name(
    classifier: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    _, weights = classifier
    changed = {name: value for name, value in weights.items() if name != "norm.bias"}
    changed |= {"pos_embed": torch.zeros(1, 4, 32), "extra": torch.zeros(2)}
    save_file(changed, tmp_path / "w.safetensors")
    source = {"init_from": str(tmp_path / "w.safetensors")}
    allow = [r"trunk\.(pos_embed|norm\.bias)", "trunk.extra"]
    fresh, _ = start()
    model, (line, _) = start(source | {"init_allow": allow})
    trunk, before = model.visual.trunk.state_dict(), fresh.visual.trunk.state_dict()
    for name, value in trunk.items():
        expected = before if name in ("pos_embed", "norm.bias") else weights
        assert torch.equal(value, expected[name]), name
    assert line.endswith(
        "allowed: missing trunk.norm.bias, unexpected trunk.extra, trunk.pos_embed is (1, 4, 32),"
        " expected (1, 16, 32)"
    )
    refused(
        "missing trunk.norm.bias", image=source | {"init_allow": ["trunk.pos_embed", ".*extra"]}
    )
    refused(r"'head' matches no parameter", image=source | {"init_allow": [*allow, "head"]})
    refused(r"image\.init_allow '\('", image=source | {"init_allow": ["("]})
    refused(r"image\.init_allow allows differences to nothing", image={"init_allow": ["x"]})


def test_another_width_of_the_joint_space_is_a_difference(dual_encoder: tuple[Path, Any]) -> None:
    source = {"init_from": str(dual_encoder[0])}
    refused(r"head\.proj\.weight is \(8, 32\), expected \(4, 32\)", image=source, embed_dim=4)
    allow = {"init_allow": [r"head\..*"]}, {"init_allow": ["text_projection"]}
    _, lines = start(source | allow[0], TINY | source | allow[1], embed_dim=4)
    assert all("; allowed: " in line for line in lines)


def test_arguments_must_be_those_of_the_source(tmp_path: Path) -> None:
    """Weights of another router fit by name and shape."""
    for make in (classification_run, contrastive_run):
        run_dir = make(tmp_path / make.__name__, **ARGUMENTS)
        model, _ = start({"init_from": str(run_dir), "arguments": ARGUMENTS})
        assert model.visual.trunk.router == "experts_choice"
        assert model.visual.image_size == (48, 48)
        (file,) = run_dir.glob("checkpoints/*/*model.safetensors")
        with pytest.raises(CheckpointError) as error:
            start({"init_from": str(file)})
        told = str(error.value).rpartition("write --image.arguments ")[2]
        assert json.loads(told.strip("'")) == ARGUMENTS
        other = ARGUMENTS | {"router": "soft"}
        refused(
            'image.arguments is {.*"soft"', image={"init_from": str(run_dir), "arguments": other}
        )
        name = {"name": TEST.replace("soft_moe", "dense")}
        refused(f"is a {TEST}: set image.name", image={"init_from": str(run_dir)} | name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"heads": 4}, r"has heads 2, the tower here 4: set text\.heads"),
        ({"moe_blocks": 1}, r"causal_soft_moe null, .* set text\.moe_blocks"),
        ({"context_length": 9}, r"positional_embedding is \(8, 16\), expected \(9, 16\)"),
        ({"init_from": "none"}, r"text\.init_from 'none' does not exist"),
    ],
)
def test_a_text_tower_of_another_shape_is_refused(
    dual_encoder: tuple[Path, Any], changes: dict[str, Any], problem: str
) -> None:
    refused(problem, text=TINY | {"init_from": str(dual_encoder[0])} | changes)


def test_sources_without_a_text_tower_are_refused(
    classifier: tuple[Path, dict[str, Tensor]], bert: Path, tmp_path: Path
) -> None:
    save_file(classifier[1], tmp_path / "w.safetensors")
    for source, problem in (
        (classifier[0], r"has no open_clip_config\.json"),
        (bert, r"a Hugging Face model goes into text\.folder"),
        (tmp_path / "w.safetensors", "holds no text tower"),
    ):
        refused(problem, text=TINY | {"init_from": str(source)})
    refused("describes no timm model", image={"init_from": str(bert)})

"""Initialising towers: what is loaded from where, and what is said about it."""

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
from transformers import BertModel

from tests.contrastive.weight_runs import (
    ARGUMENTS,
    HALF,
    TEST,
    TINY,
    assert_equal,
    bert_config,
    contrastive_run,
    hugging_face,
    inside,
    refused,
    start,
)
from training.checkpoint import CheckpointError


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

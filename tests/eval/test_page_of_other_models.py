"""The page with models that are not ours: open_clip's own towers, and a Hugging Face text tower."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from data_pipelines.picture_sets import open_picture_set
from eval.collection import build_collection
from eval.embedder import Embedder
from eval.open_model import open_model
from eval.page_answers import HITS, LABELS, Page, PageOptions
from eval.playground import Playground
from eval.search_index import ExactIndex, FaissIndex
from tests.export.conftest import bert_checkpoint, pictures


def stock_checkpoint(folder: Path) -> Path:
    """A model that open_clip builds without anything of ours, by random weights."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    preprocess = {
        "mean": [0.4, 0.5, 0.6], "std": [0.3] * 3, "interpolation": "bicubic",
        "resize_mode": "shortest",
    }  # fmt: skip
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    )
    return folder


@pytest.fixture(scope="module", params=[stock_checkpoint, bert_checkpoint])
def embedder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    return Embedder(open_model(str(request.param(tmp_path_factory.mktemp("model") / "source"))))


def page_of(embedder: Embedder, folder: Path, count: int, exact_limit: int) -> Page:
    """A page with `count` pictures, of which the first has captions."""
    (folder / "set").mkdir()
    (folder / "uploads").mkdir()
    pictures(folder / "set", count)
    (folder / "set" / "picture0.txt").write_text("a red square\nblue\n")
    found = open_picture_set(str(folder / "set"), embedder.transform, image_keys=[])
    collection = build_collection(embedder, found, exact_limit=exact_limit)
    options = PageOptions("title", [], [], ["{}"], 1 << 20)
    return Page(Playground(embedder, collection), options, folder / "uploads")


def picks(html: str) -> list[str]:
    return re.findall(r'data-pick="([^"]*)"', html)


@pytest.mark.parametrize(("count", "exact_limit"), [(1, 9), (30, 30), (30, 29)])
def test_everything_but_slots(
    embedder: Embedder, tmp_path: Path, count: int, exact_limit: int
) -> None:
    page = page_of(embedder, tmp_path, count, exact_limit)
    collection = page.playground.collection
    assert collection is not None
    assert isinstance(collection.images, ExactIndex if count <= exact_limit else FaissIndex)
    assert page.labels() == LABELS  # one caption alone is nothing to choose from
    assert picks(page.samples()) == [str(place * count // min(8, count)) for place in
                                     range(min(8, count))]  # fmt: skip
    payload = {"path": page.take(count - 1)}
    assert picks(page.find_alike(payload))[0] == str(count - 1)
    assert sorted(picks(page.describe(payload))) == ["a red square", "blue"]
    assert len(picks(page.find("a red square"))) == min(HITS, count)
    expected = embedder.texts(["a red square"])
    own = [
        embedder.images(page.playground.seen(collection.pictures.read(number))[None])[0]
        for number in range(count)
    ]
    nearest = F.cosine_similarity(torch.stack(own), expected).argmax().item()
    assert picks(page.find("a red square"))[0] == str(nearest)


def test_scores_are_those_of_open_clip(tmp_path: Path) -> None:
    folder = stock_checkpoint(tmp_path / "stock")
    playground = Playground(Embedder(open_model(str(folder))))
    assert playground.no_layers == "The image encoder of this model has no routed layers."
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    found = playground.classify(buffer.getvalue(), ["red", "a square"], ["{}"])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([score.label for score in found])
    with torch.no_grad():
        pair = model.encode_image(preprocess(image)[None]), model.encode_text(tokens)
        scaled = model.logit_scale.exp() * F.cosine_similarity(*pair)
    # Pillow and torchvision round some pixels differently.
    shares = torch.tensor([score.probability for score in found])
    torch.testing.assert_close(shares, scaled.softmax(0), atol=5e-3, rtol=0)

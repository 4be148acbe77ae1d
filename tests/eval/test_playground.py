"""What the page can do, without the page: against computations by hand on the same model."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from contrastive.config import ContrastiveConfig, ImageTowerConfig
from data_pipelines.picture_sets import open_picture_set
from encoders.routing_statistics import collect_routing
from eval.collection import Collection, build_collection
from eval.embedder import Embedder
from eval.open_model import open_model
from eval.playground import MAX_PROMPTS, Playground, Refused
from tests.tiny_models import write_dual_encoder

LABELS, TEMPLATES = ["red", "green", "a blue thing"], ["{}", "a photo of a {}."]


def as_file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Embedder:
    tower = ImageTowerConfig("soft_moe_vit_test_patch16_64", arguments={"moe_blocks": [0, 1]})
    return Embedder(open_model(str(write_dual_encoder(tmp_path_factory.mktemp("run"), tower))))


@pytest.fixture(scope="module")
def picture() -> bytes:
    """A picture that is neither square nor alike in its corners."""
    pixels = torch.arange(60 * 90 * 3, dtype=torch.int64).view(60, 90, 3) * 7 // 200 % 256
    return as_file(Image.fromarray(pixels.to(torch.uint8).numpy()))


def collect(embedder: Embedder, source: Path, cache: Path | None = None) -> Collection:
    pictures = open_picture_set(str(source), embedder.transform, image_keys=["png"])
    return build_collection(embedder, pictures, cache=cache, batch_size=5)


def test_scores_of_a_softmax_model(embedder: Embedder, picture: bytes) -> None:
    playground = Playground(embedder)
    scores = playground.classify(picture, LABELS, TEMPLATES)
    model, tokenizer = embedder.model, embedder.opened.tokenizer
    with torch.inference_mode():
        image = F.normalize(model.encode_image(embedder.pixels(playground.seen(picture)[None])))
        texts = [
            F.normalize(model.encode_text(tokenizer([t.replace("{}", label) for t in TEMPLATES])))
            for label in LABELS
        ]
        cosines = torch.cat([image @ F.normalize(rows.mean(0), dim=0)[:, None] for rows in texts])
        shares = (model.logit_scale.exp() * cosines[:, 0]).softmax(0)
    order = shares.argsort(descending=True).tolist()
    assert [score.label for score in scores] == [LABELS[place] for place in order]
    expected = [(shares[place].item(), cosines[place].item()) for place in order]
    found = [(score.probability, score.cosine) for score in scores]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)


def test_scores_of_a_sigmoid_model(tmp_path: Path, picture: bytes) -> None:
    config = ContrastiveConfig(loss="siglip", embed_dim=8, logit_scale=10, logit_bias=-3.0)
    playground = Playground(Embedder(open_model(str(write_dual_encoder(tmp_path, None, config)))))
    scores = playground.classify(picture, LABELS, ["{}"])
    for score in scores:
        expected = torch.tensor(10 * score.cosine - 3).sigmoid().item()
        assert score.probability == pytest.approx(expected, abs=1e-6)
    alone = playground.classify(picture, [scores[0].label], ["{}"])
    assert alone[0].probability == pytest.approx(scores[0].probability, abs=1e-6)


def test_searching_the_set(embedder: Embedder, shards: Path) -> None:
    collection = collect(embedder, shards)
    playground = Playground(embedder, collection)
    assert len(collection.numbers) == len(collection.captions) == 24
    seventh = collection.pictures.read(7)
    best = playground.find_alike(seventh, 3)
    assert best[0].number == 7
    assert best[0].score == pytest.approx(1, abs=1e-5)
    vectors = torch.stack([
        embedder.images(playground.seen(collection.pictures.read(number))[None])[0]
        for number in range(24)
    ])  # fmt: skip
    query = embedder.texts(["green square"])
    cosines = F.cosine_similarity(vectors, query)
    hits = playground.find(" green square\n", 30)
    assert len(hits) == 24
    expected = cosines[[hit.number for hit in hits]]
    torch.testing.assert_close(torch.tensor([hit.score for hit in hits]), expected)
    assert (expected.diff() <= 1e-6).all()
    texts = F.cosine_similarity(embedder.texts(collection.captions), vectors[7:8])
    assert [hit.number for hit in playground.describe(seventh, 4)] == texts.topk(4).indices.tolist()


def test_embeddings_are_kept(
    embedder: Embedder, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collect(embedder, shards, tmp_path)
    files = sorted(path.name[:6] for path in tmp_path.iterdir())
    assert files == ["images", "texts-"]

    def fail(*_: object) -> None:
        raise AssertionError("embedded again")

    query = torch.randn(8)
    with monkeypatch.context() as patch:
        patch.setattr(embedder, "images", fail)
        patch.setattr(embedder, "texts", fail)
        second = collect(embedder, shards, tmp_path)
    for name in ("nearest_pictures", "nearest_captions"):
        assert getattr(first, name)(query, 24) == getattr(second, name)(query, 24)
    with torch.no_grad():  # another model
        embedder.model.visual.head.proj.weight.mul_(-1)
    try:
        other = collect(embedder, shards, tmp_path)
    finally:
        with torch.no_grad():
            embedder.model.visual.head.proj.weight.mul_(-1)
    pairs = zip(other.nearest_pictures(query, 24), first.nearest_pictures(-query, 24), strict=True)
    assert all(a.score == pytest.approx(b.score, abs=1e-5) for a, b in pairs)
    damaged = next(tmp_path.glob("texts-*"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert collect(embedder, shards, tmp_path).nearest_captions(
        query, 24
    ) == first.nearest_captions(query, 24)


def test_looking_inside(embedder: Embedder, picture: bytes) -> None:
    playground = Playground(embedder)
    assert [(layer.block, layer.slots, layer.experts) for layer in playground.layers] == [
        (0, 4, 4), (1, 4, 4)
    ]  # fmt: skip
    images = embedder.pixels(playground.seen(picture)[None])
    for layer, routing in zip(
        playground.look_inside(picture),
        collect_routing(embedder.image_trunk(), images).values(),
        strict=True,
    ):
        assert torch.equal(layer.dispatch, routing.dispatch)
        assert torch.equal(layer.combine, routing.combine)


@pytest.mark.parametrize(
    ("tower", "reason"),
    [
        (ImageTowerConfig("dense_vit_test_patch16_64"), "has no routed layers."),
        (
            ImageTowerConfig("soft_moe_vit_test_patch16_64", arguments={"router": "tokens_choice"}),
            "no routed layers with slots.",
        ),
    ],
)
def test_models_without_slots_say_so(tmp_path: Path, tower: ImageTowerConfig, reason: str) -> None:
    playground = Playground(Embedder(open_model(str(write_dual_encoder(tmp_path, tower)))))
    assert playground.layers == []
    assert playground.no_layers.endswith(reason)


@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_turned_as_cameras_say(embedder: Embedder, picture: bytes, turn: int) -> None:
    image = Image.open(io.BytesIO(picture))
    exif = Image.Exif()
    exif[274] = turn
    data = as_file(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = Playground(embedder).picture(data)
    assert torch.equal(found, torch.tensor(list(expected.tobytes())).view(*expected.size[::-1], 3)
                       .permute(2, 0, 1).byte())  # fmt: skip


def test_what_cannot_be_used_is_refused(embedder: Embedder, picture: bytes) -> None:
    playground = Playground(embedder, max_pixels=6000)
    for data, message in (
        (b"hello", "no picture that can be read: give one as JPEG"),
        (b"", "no picture"),
        (as_file(Image.new("RGB", (80, 80))), "more than 6,000 pixels"),
    ):
        with pytest.raises(Refused, match=message):
            playground.classify(data, LABELS, TEMPLATES)
    for labels, templates, message in (
        ([], ["{}"], "no label"),
        (["a", "  "], ["{}"], "no label"),
        (["a"], [], "no template"),
        (["a"], ["photo"], "0 placeholders"),
        (["a"], ["{} {}"], "2 placeholders"),
        (["a" * 2001], ["{}"], "over 2,000 characters"),
        (["a"] * MAX_PROMPTS, ["{}", "a {}"], "over 4,096 prompts"),
    ):
        with pytest.raises(Refused, match=message):
            playground.classify(picture, labels, templates)
    assert playground.find("anything", 3) == playground.describe(picture, 3) == []
    with pytest.raises(Refused, match="no query"):
        playground.find(" ", 3)

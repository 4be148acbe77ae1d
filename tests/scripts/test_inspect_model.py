"""The inspection command: sizes of models of any size, routing of checkpoints, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from contrastive.config import ContrastiveConfig, ImageTowerConfig, TextTowerConfig
from contrastive.dual_encoder import build_dual_encoder, model_config
from contrastive.objective import ContrastiveObjective
from encoders.model_size import measure
from encoders.routing_inspection import InspectedLayer, choose_layer
from encoders.variants import DENSE_TWINS
from eval.image_tower import open_image_tower
from scripts import inspect_model, pretrain
from training.checkpoint import CheckpointWriter

TEST = "soft_moe_vit_test_patch16_64"
HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def classifier(
    fresh_accelerate: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shards: Path
) -> Path:
    """The run directory of a classification run of three steps."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_dir = tmp_path / "pretrain"
    pretrain.main([
        f"--run_dir={run_dir}", f"--model.name={TEST}", f"--data.shards={shards}/train-*.tar",
        f"--data.classnames={shards}/classnames.txt", "--train.steps=3", "--train.batch_size=4",
        "--train.threads=1", "--data.workers=0", "--train.log_every=2",
    ])  # fmt: skip
    return run_dir


@pytest.fixture
def dual_encoder(tmp_path: Path) -> Path:
    """The run directory of a contrastive run, with an untrained model."""
    config = ContrastiveConfig(embed_dim=8)
    text = TextTowerConfig(width=16, heads=2, layers=1, context_length=8)
    description = model_config(ImageTowerConfig(TEST), text, config)
    model = build_dual_encoder(description)
    objective = ContrastiveObjective(model, description, config, HALF, HALF)
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 7)
    writer.begin()
    writer.add_tensors(objective.weights_file, model.state_dict())
    for name, content in objective.config_files().items():
        writer.add_json(name, content)
    writer.publish(7)
    return tmp_path / "run"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        inspect_model.main(list(arguments))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_the_largest_model_beside_its_twin(capsys: pytest.CaptureFixture[str]) -> None:
    """The figures of the paper's Tables 1 and 8, without the memory that 54B weights take."""
    inspect_model.main(["soft_moe_vit_huge_patch14_224"])
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:34].strip(): line[34:].split() for line in lines}
    assert rows["parameters"] == ["54.14", "B", "632.05", "M"]
    assert rows["used by one image, at most"] == ["54.14", "B", "632.05", "M"]
    assert rows["with one expert per layer"] == ["637.29", "M", "632.05", "M"]
    soft, dense = map(float, rows["GFLOPs"])
    assert soft == pytest.approx(342.4, rel=0.01)
    assert dense == pytest.approx(334.2, rel=0.01)


@pytest.mark.parametrize(("name", "autocast"), [(TEST, True), (DENSE_TWINS[TEST], False)])
def test_activation_memory_is_what_autograd_keeps(name: str, autocast: bool) -> None:
    """The same tensors, counted on a real model; parameters are always there and do not count."""
    model = timm.create_model(name, num_classes=7)
    found = measure(model, (64, 64))

    def saved(batch: int) -> int:
        kept: dict[int, Any] = {}
        own = {parameter.data_ptr() for parameter in model.parameters()}

        def keep(tensor: Any) -> Any:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            result = model(torch.randn(batch, 3, 64, 64))
        del result
        return sum(storage.nbytes() for address, storage in kept.items() if address not in own)

    # Attention keeps a few bytes more on some CPUs than its fake kernel says.
    expected = found.autocast_activation_bytes if autocast else found.activation_bytes
    assert (saved(6) - saved(2)) / 4 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("router", "per_image"),
    [("soft", 4), ("experts_choice", 4), ("tokens_choice", 3), ("uniform", 4)],
)
def test_sizes_of_other_routers(router: str, per_image: int) -> None:
    options = {"img_size": (48, 16)}  # three tokens choose at most three of four experts
    with torch.device("meta"):
        model = timm.create_model(TEST, num_classes=0, router=router, **options)
        dense = timm.create_model(DENSE_TWINS[TEST], num_classes=0, **options)
    sizes, twin = measure(model, (48, 16)), measure(dense, (48, 16))
    expert = 2 * 32 * 128 + 32 + 128
    assert sizes.expert_parameters == 4 * expert
    assert sizes.image_parameters == sizes.parameters - (4 - per_image) * expert
    assert sizes.slot_parameters == sizes.parameters - 3 * expert
    assert 0 <= sizes.slot_parameters - twin.parameters <= 32 * 4 + 1  # what routers add
    real = timm.create_model(TEST, num_classes=0, router=router, **options).eval()
    layer: Any = real.blocks[1].mlp
    batch = getattr(layer, "group_size", 1)
    # torch 2.11 does not count its fused attention on the CPU.
    attention = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), attention:
        real(torch.zeros(batch, 3, 48, 16))
    assert sizes.flops == counter.get_total_flops() / batch
    assert sizes.activation_bytes > 0
    assert model.training


def test_models_of_others_are_measured() -> None:
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    size = measure(model, (224, 224))
    assert (size.parameters, size.expert_parameters) == (11_689_512, 0)
    assert size.flops == pytest.approx(3.63e9, rel=0.01)  # 1.81 G multiply-adds


def test_a_classification_run(
    capsys: pytest.CaptureFixture[str], classifier: Path, shards: Path, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (classifier / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(0 < row["routing/blocks.1/combine_entropy"] <= 1 for row in rows)
    capsys.readouterr()
    figure = tmp_path / "figure.png"
    inspect_model.main([str(classifier), f"--images={shards}", f"--output={figure}", "--rows=2"])
    out = capsys.readouterr().out
    assert f"routing of 24 pictures by {classifier}/checkpoints/step_00000003\n" in out
    assert "blocks.1" in out
    with Image.open(figure) as picture:
        assert picture.width > picture.height > 500


def test_a_contrastive_run_and_a_folder_of_pictures(
    capsys: pytest.CaptureFixture[str], dual_encoder: Path, tmp_path: Path
) -> None:
    pictures, figure = tmp_path / "pictures", tmp_path / "figure.png"
    pictures.mkdir()
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (20, 30), colour).save(pictures / f"{number}.png")
    (pictures / "broken.jpg").write_bytes(b"nothing")
    inspect_model.main([str(dual_encoder), f"--images={pictures}", f"--output={figure}"])
    out = capsys.readouterr().out
    assert "routing of 3 pictures" in out
    assert figure.is_file()
    checkpoint = dual_encoder / "checkpoints" / "step_00000007"
    with_weights = open_image_tower(str(checkpoint))
    without = open_image_tower(str(dual_encoder), weights=False)
    assert without.model.cls_token is None
    assert all(parameter.is_meta for parameter in without.model.parameters())
    shapes = [
        {name: tuple(value.shape) for name, value in tower.model.state_dict().items()}
        for tower in (with_weights, without)
    ]
    assert shapes[0] == shapes[1]


def test_what_cannot_be_inspected_is_refused(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    images = f"--images={shards}"
    missing = tmp_path / "none" / "figure.png"
    for arguments, problem in (
        ([], "no model given"),
        (["soft_moe_vit_tset_patch16_64"], f"did you mean {TEST}"),
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path / "empty")], "no checkpoint"),
        ([str(tmp_path / "broken")], "cannot be opened"),
        ([TEST, f"--images={tmp_path / 'empty'}"], "without pictures"),
        ([TEST, f"--images={tmp_path / 'none.tar'}"], "no shard matches"),
        ([TEST, images, "--block=0"], "block 0 has no slots: choose from 1"),
        ([TEST, images, "--rows=0"], "rows must be at least 1"),
        ([TEST, images, "--output=figure.exe"], "ends in .png, .pdf or .svg"),
        ([TEST, images, f"--output={missing}"], f"make the folder '{missing.parent}' first"),
        ([TEST, "--imagse=x"], "did you mean 'images'"),
        (["dense_vit_test_patch16_64", images], "no routed layer"),
    ):
        assert problem in refusal(capsys, *arguments), arguments


@pytest.mark.parametrize("wrong", ["images", "output"])
def test_paths_are_checked_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path, wrong: str
) -> None:
    paths = {"images": shards, "output": tmp_path / "figure.png"} | {
        wrong: tmp_path / "no" / "x.png"
    }
    with pytest.raises(SystemExit) as stop:
        inspect_model.main([TEST, *(f"--{name}={path}" for name, path in paths.items())])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1


def test_help_is_short_of_heavy_imports(run_python: Any) -> None:
    code = (
        "import sys\nfrom scripts.inspect_model import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print('loaded:', sorted({'torch', 'timm', 'matplotlib'} & set(sys.modules)))\n"
    )
    result = run_python("-c", code)
    assert result.stdout.splitlines()[-1] == "loaded: []"
    assert "--images" in result.stdout


def test_layers_are_compared_by_what_their_weights_say() -> None:
    uniform, peaked = torch.full((2, 4, 3), 0.25), torch.eye(4)[:, :3].expand(2, -1, -1)
    layers = [
        InspectedLayer(block, dispatch, torch.full((2, 4, 3), 1 / 3), 3, None)
        for block, dispatch in ((3, uniform), (5, peaked), (7, peaked))
    ]
    assert choose_layer(layers) == 1
    # The fourth token gets nothing; three slots share the rest.
    assert layers[1].token_weight()[0].tolist() == pytest.approx([4 / 3, 4 / 3, 4 / 3, 0])
    assert layers[1].expert_weight().tolist() == pytest.approx([1, 1, 1])
    # Departures from uniform of different one-hot maps: -1/3 of each other.
    cosine = layers[1].slot_correlation()
    torch.testing.assert_close(
        cosine, cosine.new_full((3, 3), -1 / 3).fill_diagonal_(1), atol=1e-5, rtol=0
    )

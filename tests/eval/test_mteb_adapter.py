"""mteb evaluates our checkpoints: its mock tasks of images, and its figures against ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
from mteb import mocks

from eval.subject import Subject, open_subject
from scripts import evaluate_mteb
from tests.tiny_models import write_dual_encoder


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return open_subject(str(write_dual_encoder(tmp_path_factory.mktemp("mteb") / "run")))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def measure(subject: Subject, *names: str) -> dict[str, Any]:
    from eval.mteb_adapter import MtebEncoder

    found = mteb.evaluate(
        MtebEncoder(subject), [getattr(mocks, name)() for name in names], cache=None,
        co2_tracker=False, show_progress_bar=False,
    )  # fmt: skip
    assert found.model_name.startswith("softmoe-clip/")
    return {result.task_name: result for result in found.task_results}


def test_mock_tasks_of_images_run(subject: Subject) -> None:
    names = [
        "MockImageClassificationTask", "MockImageClusteringFastTask", "MockVisualSTSTask",
        "MockImageTextPairClassificationTask", "MockAny2AnyRetrievalI2TTask",
        "MockAny2AnyRetrievalT2ITask", "MockImageMultilabelClassificationTask",
    ]  # fmt: skip
    found = measure(subject, *names)
    assert len(found) == len(names)
    scores = {name: result.get_score() for name, result in found.items()}
    scores.pop("MockVisualSTS")  # undefined: the mock has one score for all pairs
    assert all(np.isfinite(score) for score in scores.values())


def test_its_zero_shot_figure_is_ours(subject: Subject) -> None:
    from mteb import mocks
    from torchvision.transforms.v2.functional import pil_to_tensor

    task = mocks.MockZeroShotClassificationTask()
    task.load_data()
    split = task.dataset["test"]
    whole = subject.for_set(None)
    assert whole.encode_image is not None
    assert whole.encode_text is not None
    pixels = [whole.transform(pil_to_tensor(image.convert("RGB"))) for image in split["image"]]
    images = torch.nn.functional.normalize(whole.encode_image(torch.stack(pixels)), dim=1)
    texts = torch.nn.functional.normalize(whole.encode_text(task.get_candidate_labels()), dim=1)
    right = ((images @ texts.T).argmax(1) == torch.tensor(split["label"])).double().mean().item()
    (result,) = measure(subject, "MockZeroShotClassificationTask").values()
    assert result.get_score() == pytest.approx(right)


def test_results_are_kept_apart_by_all_that_embeddings_depend_on(
    subject: Subject, tmp_path: Path
) -> None:
    """mteb does not measure again what it has of the same name and revision."""
    from eval.mteb_adapter import MtebEncoder

    def revision(of: Subject) -> str | None:
        found = mteb.evaluate(
            MtebEncoder(of), [mocks.MockZeroShotClassificationTask()],
            cache=mteb.ResultCache(tmp_path), co2_tracker=False, show_progress_bar=False,
        )  # fmt: skip
        assert len(found.task_results) == 1
        return found.model_revision

    def kept() -> int:
        return len(list(tmp_path.rglob("MockZeroShotClassification.json")))

    resize = subject.resize
    assert resize is not None
    plain = revision(subject)
    assert revision(open_subject(subject.name)) == plain
    assert kept() == 1
    others = {
        revision(open_subject(subject.name, precision="bf16")),
        revision(replace(subject, resize=lambda _: resize("shortest"))),
    }
    assert len(others - {plain}) == 2
    assert kept() == 3


def test_a_model_without_a_text_tower_says_so(subject: Subject) -> None:
    from eval.mteb_adapter import MtebEncoder

    blind = MtebEncoder(replace(subject, encode_image=None, encode_text=None))
    assert blind.mteb_model_meta.modalities == ["image"]
    with pytest.raises(ValueError, match="has no text tower"):
        blind.encode([{"text": ["a"]}], task_metadata=None, hf_split="test", hf_subset="default")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model=x"], "set either --benchmark or --tasks"),
        (["--tasks=CIFAR10ZeroShot"], "no model given"),
        (["--model=x", "--tasks=NoSuchTask"], "mteb does not know it"),
        (["--model=x", "--benchmark=NoSuch"], "mteb does not know it"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        evaluate_mteb.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_our_tasks_are_there() -> None:
    """Names that the documentation tells."""
    for name in ("MIEB(lite)", "MIEB(eng)", "MIEB(Img)"):
        assert mteb.get_benchmark(name).tasks
    assert [task.metadata.name for task in mteb.get_tasks(tasks=["CIFAR10ZeroShot", "VOC2007"])]

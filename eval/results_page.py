"""What the HTML page of an evaluation shows: figures, confusion, best and worst retrievals."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.evaluation import SampleSet
from eval.report_data import ImageQuery, Matrix, Report, Table, TextQuery
from eval.retrieval import unit_rows
from eval.tables import short

if TYPE_CHECKING:
    from eval.measure import Outcome

MAX_CLASSES = 50  # of a matrix that can be looked at
ANSWERS = 5  # shown for each query
TITLES = {
    "zeroshot_classification": "zero-shot classification",
    "zeroshot_retrieval": "zero-shot retrieval",
    "few_shot": "few-shot probe",
    "linear_probe": "linear probe",
    "knn": "nearest neighbours",
}


def results_report(outcomes: list[Outcome]) -> Report:
    """The page of the outcomes of one model."""
    records = [outcome.record for outcome in outcomes]
    sets = list(dict.fromkeys(record["dataset"] for record in records))
    first = records[0]
    texts: list[TextQuery] = []
    images: list[ImageQuery] = []
    for outcome in outcomes:
        if "examples" in outcome.measured.details:
            found = _Examples(outcome)
            texts += found.text_queries()
            images += found.image_queries()
    return Report(
        title=f"Evaluation of {first['model']}",
        summary=[
            f"Measured on {', '.join(sets)} in {first['precision']}; every figure with its 95 %"
            " bootstrap interval."
        ],
        tables=[_figures(outcome) for outcome in outcomes] + _worst_classes(outcomes),
        curves=[],
        text_queries=texts,
        image_queries=images,
        pictures=[],
        facts=_facts(outcomes),
        matrices=[matrix for outcome in outcomes for matrix in _matrices(outcome)],
    )


def _name(record: dict[str, Any]) -> str:
    return f"{record['dataset']}: {TITLES[record['task']]}"


def _figures(outcome: Outcome) -> Table:
    record, rows = outcome.record, []
    for name, value in record["metrics"].items():
        low, high = (short(bound) for bound in record["ci95"].get(name, (None, None)))
        rows.append([name.replace("_", " "), short(value), low, high])
    words = [f"{record['n_samples']:,} samples"]
    if record["n_skipped"]:
        words.append(f"{record['n_skipped']:,} skipped")
    if "n_train" in record:
        words.append(f"{record['n_train']:,} to learn from")
    return Table(_name(record), ["", "value", "from", "to"], rows, ", ".join(words))


def _worst_classes(outcomes: list[Outcome]) -> list[Table]:
    tables = []
    for outcome in outcomes:
        worst = outcome.measured.details.get("worst_classes")
        if not worst:
            continue
        keys = [key for key in worst[0] if key != "class"]
        rows = [[entry["class"], *(_cell(entry[key]) for key in keys)] for entry in worst]
        header = ["class", *({"n": "samples", "taken_for": "most often taken for"}.get(
            key, key.replace("_", " ")) for key in keys)]  # fmt: skip
        tables.append(Table(f"Worst classes, {_name(outcome.record)}", header, rows))
    return tables


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return short(value) if isinstance(value, float) else value or "-"


def _matrices(outcome: Outcome) -> list[Matrix]:
    counts = outcome.measured.details.get("confusion_matrix")
    names = outcome.planned.classnames
    if counts is None or len(names) > MAX_CLASSES:
        return []
    note = "Rows are the true classes, columns the answers; colour is the share of the row."
    return [Matrix(_name(outcome.record), names, counts, note)]


def _facts(outcomes: list[Outcome]) -> dict[str, str]:
    first = outcomes[0].record
    facts = {
        "Model": first["model"],
        "Opened from": first["pretrained"],
        "SHA-256 of the weights": first["weights_sha256"],
        "Precision": first["precision"],
        "Preprocessing": ", ".join(f"{k} {v}" for k, v in first["preprocess"].items()),
        "Versions": ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
    }
    for outcome in outcomes:
        record = outcome.record
        facts[f"Set {record['dataset']}"] = (
            f"{record['shards']}, {record['split']}, fingerprint {record['shards_fingerprint']}"
        )
        if "templates" in record:
            facts[f"Templates of {record['dataset']}"] = " | ".join(record["templates"])
    return facts


class _Examples:
    """The best and the worst queries of a retrieval, with what was found for them."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome, self.found = outcome, outcome.found
        self.chosen = outcome.measured.details["examples"]
        self.images = unit_rows(self.found.rows["image"], "images").float()
        self.texts = unit_rows(self.found.rows["text"], "texts").float()
        self.picture = _reader(outcome.planned.test)

    def _queries(self, side: str) -> list[tuple[int, str, int]]:
        """Number, note and rank of the queries of one direction."""
        ranks = self.outcome.measured.samples[f"{side}_retrieval_mean_rank"]
        return [
            (query, f"{self.outcome.record['dataset']}, one of the {kind}", int(ranks[query]))
            for kind, queries in self.chosen[side].items()
            for query in queries
        ]

    def text_queries(self) -> list[TextQuery]:
        found = []
        for query, note, rank in self._queries("image"):
            scores, best = _nearest(self.images, self.texts[query])
            owner = int(self.found.owners[query])
            found.append(
                TextQuery(
                    self.found.captions[query],
                    [self.picture(self.found.numbers[row]) for row in best],
                    scores,
                    [row == owner for row in best],
                    note,
                    rank,
                )
            )
        return found

    def image_queries(self) -> list[ImageQuery]:
        found, owners = [], self.found.owners.tolist()
        for query, note, rank in self._queries("text"):
            scores, best = _nearest(self.texts, self.images[query])
            found.append(
                ImageQuery(
                    self.picture(self.found.numbers[query]),
                    [self.found.captions[row] for row in best],
                    scores,
                    [owners[row] == query for row in best],
                    note,
                    rank,
                )
            )
        return found


def _nearest(pool: Tensor, query: Tensor) -> tuple[list[float], list[int]]:
    scores, best = (pool @ query).topk(min(ANSWERS, len(pool)))
    return scores.tolist(), best.tolist()


def _reader(samples: SampleSet) -> Callable[[int], np.ndarray]:
    """Pictures as they lie in the set, uint8 (H, W, 3), by the sample's number."""

    def read(number: int) -> np.ndarray:
        before, samples.transform = samples.transform, _untouched
        try:
            return np.ascontiguousarray(samples[number]["image"].permute(1, 2, 0).numpy())
        finally:
            samples.transform = before

    return read


def _untouched(image: torch.Tensor) -> torch.Tensor:
    return image

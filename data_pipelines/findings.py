"""Problems of shards: their kinds, and the report of all that were found."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from data_pipelines.shard_survey import printable
from data_pipelines.shards import ShardIndex

# Every kind of problem, and what it means.
KINDS = {
    "broken_shard": "no tar file, compressed, or cannot be read",
    "truncated_shard": "ends early or is damaged; what lies behind the damage is lost",
    "empty_shard": "a tar file without samples",
    "miscounted_shard": "holds other than the samples that the _stats.json beside it has counted",
    "unread_member": "a link, a device, a hidden file or a name without extension",
    "scattered_members": "members of a sample do not stand together; many readers split it",
    "pickle_member": "a member that other readers would unpickle, which may run code",
    "unsafe_name": "an absolute name, one that climbs out of its folder, or is no text",
    "missing_member": "no picture, or no caption or label where other samples have one",
    "broken_image": "cannot be decoded",
    "tiny_image": "a side under min_side",
    "huge_image": "over max_pixels, or a member too large to read",
    "unreadable": "bytes that the disk or the store did not give, in several attempts",
    "empty_caption": "a caption without a letter",
    "broken_caption": "no UTF-8, no JSON, a field that is missing, or over 1 MiB",
    "broken_label": "no integer, nor one of classnames",
    "duplicate_key": "the key of an earlier sample",
    "duplicate_image": "the bytes of an earlier picture",
    "near_duplicate": "nearly the pixels of an earlier picture",
}
# webdataset's decoders and `datasets` unpickle members of these names.
PICKLES = {"pickle", "pkl", "pyd", "pth", "pt", "ten"}


@dataclass(frozen=True)
class Finding:
    """One problem: where, of which kind, and in which way. The key is empty for a whole shard,
    and `sample` its number in shard order, -1 for what is no sample."""

    kind: str
    shard: str
    key: str = ""
    detail: str = ""
    sample: int = -1


@dataclass
class Validation:
    """All that was found; `index` is null where no shard can be used."""

    paths: list[str]
    index: ShardIndex | None
    findings: list[Finding]

    @property
    def counts(self) -> Counter[str]:
        return Counter(finding.kind for finding in self.findings)

    def bad_samples(self) -> set[int]:
        """Samples with a problem that a cleaned copy leaves out: a scattered sample is put
        together there, and only the member goes that others would unpickle."""
        mended = ("scattered_members", "pickle_member")
        return {f.sample for f in self.findings if f.sample >= 0 and f.kind not in mended}

    def as_json(self) -> dict[str, Any]:
        """Counts and every finding, plain values."""
        findings = []
        for finding in self.findings:
            entry = asdict(finding) | {"key": printable(finding.key)}
            findings.append({name: entry[name] for name in ("kind", "shard", "key", "detail")})
        return {
            "shards": len(self.paths),
            "samples": 0 if self.index is None else len(self.index),
            "problems": dict(self.counts.most_common()),
            "findings": findings,
        }

    def lines(self, examples: int = 3) -> list[str]:
        """The report for a reader: each kind with its count, meaning and some examples."""
        samples = 0 if self.index is None else len(self.index)
        head = f"{samples} samples in {len(self.paths)} shards: "
        if not self.findings:
            return [head + "no problems"]
        count = len(self.findings)
        lines = [head + f"{count} problem{'s' if count != 1 else ''}"]
        for kind, count in self.counts.most_common():
            lines.append(f"{count:8} {kind:<18} {KINDS[kind]}")
            found = [finding for finding in self.findings if finding.kind == kind]
            for finding in found[:examples]:
                place = " ".join(filter(None, [finding.shard, printable(finding.key)]))
                detail = f": {printable(finding.detail)}" if finding.detail else ""
                lines.append(f"{'':11}{place}{detail}")
        return lines

"""The tools read shards from a real server as they do from a disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data_pipelines.clean_copy import write_clean_copy
from data_pipelines.shard_stats import measure
from data_pipelines.tool_config import StatsConfig, ValidateConfig
from data_pipelines.validate import validate
from tests.data_pipelines.http_server import ShardServer


def test_validate_and_stats_over_http(
    make_shard: Callable[..., Path],
    picture: Callable[[int], bytes],
    server: ShardServer,
    tmp_path: Path,
) -> None:
    samples = [(f"k{n}", {"png": picture(n % 3), "txt": b"words"}) for n in range(4)]
    samples[1][1]["pickle"] = b"\x80\x04."
    make_shard("0.tar", samples)
    here = f"{server.url}/0.tar"
    found = validate(ValidateConfig(here), 0)
    kinds = {(finding.kind, finding.key) for finding in found.findings}
    assert kinds == {("pickle_member", "k1"), ("duplicate_image", "k3")}
    assert write_clean_copy(found, tmp_path / "clean") == (1, 3, {})
    assert list(measure(StatsConfig(here, tokenizer=None), 0).tally.widths) == [20] * 4
    assert not validate(ValidateConfig(str(tmp_path / "clean")), 0).findings

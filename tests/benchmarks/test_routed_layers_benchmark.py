"""The benchmark measures what its labels say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.routed_layers import DENSE, SETTINGS, Case, build, present, run_pass, summarise

CASES = {case.label: case for setting in SETTINGS for case in setting.cases if present(case)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_builds_and_trains(case: Case) -> None:
    layer = build(case, 8)
    tokens = torch.randn(8, 196, 8, requires_grad=True)  # Tokens Choice groups 8
    run_pass(layer, tokens, "forward")
    assert tokens.grad is None
    run_pass(layer, tokens, "training")
    assert tokens.grad is not None
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_batched_experts_compute_the_same() -> None:
    ours, batched = build(CASES["SoftMoE 32x6"], 8), build(CASES["batched 32x6"], 8)
    batched.load_state_dict(ours.state_dict())
    tokens = torch.randn(2, 196, 8)
    torch.testing.assert_close(batched(tokens), ours(tokens), rtol=1e-5, atol=1e-6)


def test_ratios_are_medians_over_rounds_against_the_named_case() -> None:
    setting = SETTINGS[0]
    dense = {"forward": [1.0, 2.0, 9.0], "training": [4.0] * 3, "peak_bytes": 2**20}
    soft = {"forward": [2.0, 2.0, 18.0], "training": [2.0] * 3, "peak_bytes": 3 * 2**20}
    rows = summarise(setting, {DENSE.label: dense, "SoftMoE 32x6": soft})
    assert [row["case"] for row in rows] == [DENSE.label, "SoftMoE 32x6"]
    assert rows[0]["forward_ms"] == 2000.0
    assert "against" not in rows[0]
    assert rows[1]["against"] == DENSE.label
    assert (rows[1]["forward_ratio"], rows[1]["training_ratio"]) == (2.0, 0.5)
    assert (rows[1]["peak_mib"], rows[1]["peak_ratio"]) == (3.0, 3.0)

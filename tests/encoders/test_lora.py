"""Low-rank adapters: exact at the start, merged and unmerged; what trains; adapter files."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoders import variants
from encoders.experts import ExpertMLP
from encoders.lora import EXPERTS, Lora, add_lora, load_lora

BANK = "blocks.1.mlp.experts"
KERNELS = [
    *(f"blocks.{b}.attn.{part}.weight" for b in (0, 1) for part in ("qkv", "proj")),
    *(f"blocks.0.mlp.{part}.weight" for part in ("fc1", "fc2")),
    *(f"{BANK}.{part}_weight" for part in ("fc1", "fc2")),
]  # fmt: skip


def tiny(**options: Any) -> Any:
    """A model whose every parameter matters: experts differ, and the head is not zero."""
    torch.manual_seed(0)
    model = variants.soft_moe_vit_test_patch16_64(num_classes=5, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def disturb(lora: Lora) -> None:
    with torch.no_grad():
        for tensor in lora.state_dict().values():
            tensor.copy_(0.2 * torch.randn_like(tensor))


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model: nn.Module, bf16: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(images())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_fresh_adapter_changes_no_bit_and_merging_neither(bf16: bool) -> None:
    model = tiny()
    before, weights = outputs(model, bf16), copy.deepcopy(model.state_dict())
    lora = add_lora(model, rank=3, alpha=5)
    assert sorted(lora.places) == sorted(KERNELS)
    assert torch.equal(outputs(model, bf16), before)
    disturb(lora)
    adapted = outputs(model, bf16)
    assert (adapted - before).abs().max() > 0.1
    lora.merge()
    lora.merge()  # a second time changes nothing
    assert torch.equal(outputs(model, bf16), adapted)
    assert model.state_dict().keys() == weights.keys()
    assert type(model.blocks[1].mlp.experts) is ExpertMLP
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(outputs(plain, bf16), adapted)
    lora.unmerge()
    assert torch.equal(outputs(model, bf16), adapted)
    for name, value in weights.items():
        owner, _, kernel = name.rpartition(".")
        found = model.state_dict().get(f"{owner}.parametrizations.{kernel}.original")
        assert torch.equal(model.state_dict()[name] if found is None else found, value), name


def test_products_are_those_of_the_paper_expert_by_expert() -> None:
    model = tiny()
    base = {name: model.get_parameter(name).detach().clone() for name in KERNELS}
    lora = add_lora(model, rank=2, alpha=6)
    disturb(lora)
    factors = lora.state_dict()
    lora.merge()
    weights = model.state_dict()
    for expert in range(4):  # x @ W: inputs first
        for name, inputs, hidden in (("fc1_weight", 32, 128), ("fc2_weight", 128, 32)):
            down, up = factors[f"{BANK}.{name}.down"], factors[f"{BANK}.{name}.up"]
            assert down.shape == (4, inputs, 2)
            assert up.shape == (4, 2, hidden)
            expected = base[f"{BANK}.{name}"][expert] + 3 * down[expert] @ up[expert]
            torch.testing.assert_close(weights[f"{BANK}.{name}"][expert], expected)
    name = "blocks.0.attn.qkv.weight"  # x @ W.T: outputs first
    assert factors[f"{name}.up"].shape == (96, 2)
    expected = base[name] + 3 * factors[f"{name}.up"] @ factors[f"{name}.down"]
    torch.testing.assert_close(weights[name], expected)


@pytest.mark.parametrize(
    ("train", "whole"),
    [((), set()), (("head.*", "*.phi"), {"head.weight", "head.bias", "blocks.1.mlp.phi"})],
)
def test_only_adapters_and_what_is_named_trains(train: tuple[str, ...], whole: set[str]) -> None:
    model = tiny().train()
    lora = add_lora(model, rank=2, targets=EXPERTS, train=train)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # in the first step, only `up` has a gradient that is not zero
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if (value != before[name]).any()}
    adapters = {
        f"{BANK}.parametrizations.{kernel}.0.{factor}"
        for kernel in ("fc1_weight", "fc2_weight")
        for factor in ("down", "up")
    }
    assert changed == adapters | whole
    assert len(lora.state_dict()) == 4 + len(whole)
    # The size that the literature gives: 2 r (d + h) numbers per expert.
    trained = sum(p.numel() for place in lora.places.values() for p in place.adapter.parameters())
    assert trained == 2 * 4 * 2 * (32 + 128)


def test_gradients_reach_the_factors_through_the_kernel() -> None:
    model = tiny()
    lora = add_lora(model, rank=2, alpha=6, targets=[f"{BANK}.fc1_weight"])
    disturb(lora)
    model(images()).sum().backward()
    adapter = lora.places[f"{BANK}.fc1_weight"].adapter
    lora.merge()
    kernel = model.blocks[1].mlp.experts.fc1_weight.requires_grad_(True)
    model(images()).sum().backward()
    for found, expected in (
        (adapter.down.grad, 3 * kernel.grad @ adapter.up.mT),
        (adapter.up.grad, 3 * adapter.down.mT @ kernel.grad),
    ):
        torch.testing.assert_close(found, expected)


def test_an_adapter_file_holds_what_was_trained_and_nothing_else(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "adapter.safetensors"
    lora = add_lora(model, rank=2, alpha=8, targets=["blocks.1.*fc1_weight"], train=["head.*"])
    disturb(lora)
    lora.save(path)
    assert sorted(load_file(path)) == [
        f"{BANK}.fc1_weight.down", f"{BANK}.fc1_weight.up", "head.bias", "head.weight",
    ]  # fmt: skip
    other = tiny()
    again = load_lora(other, path)
    assert (again.rank, again.alpha) == (2, 8)
    assert torch.equal(outputs(other), outputs(model))
    again.merge()
    with pytest.raises(ValueError, match="unmerge"):
        again.load_state_dict(lora.state_dict())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        load_lora(tiny(), tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="no adapter"):
        load_lora(tiny(), tmp_path / "plain.safetensors")
    lora = add_lora(tiny(), rank=2, targets=EXPERTS)
    lora.save(tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"fc1_weight' matches no parameter"):
        load_lora(tiny(moe_blocks=0), tmp_path / "adapter.safetensors")
    model = tiny(num_experts=8)
    names = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"differs in blocks\.1\.mlp\.experts\.fc1_weight\.down"):
        load_lora(model, tmp_path / "adapter.safetensors")
    assert model.state_dict().keys() == names  # and the model is as it was
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, rank=2)


def test_an_adapter_does_not_come_back_below_another() -> None:
    model = tiny()
    first = add_lora(model, rank=2)
    disturb(first)
    adapted = outputs(model)
    first.merge()
    second = add_lora(model, rank=2, targets=[f"{BANK}.fc2_weight"])
    with pytest.raises(ValueError, match=r"fc2_weight' has another adapter by now"):
        first.unmerge()
    assert torch.equal(outputs(model), adapted)  # nothing counts twice
    second.merge()
    first.unmerge()
    assert torch.equal(outputs(model), adapted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_can_be_cast_while_merged(dtype: torch.dtype) -> None:
    model, twin = tiny(), tiny()
    lora, same = add_lora(model, rank=2), add_lora(twin, rank=2)
    disturb(lora)
    same.load_state_dict(lora.state_dict())
    lora.merge()
    model.to(dtype)
    lora.unmerge()
    twin.to(dtype)
    assert all(torch.equal(v, twin.state_dict()[name]) for name, v in model.state_dict().items())
    assert torch.equal(model(images().to(dtype)), twin(images().to(dtype)))


def test_what_cannot_be_adapted_is_refused() -> None:
    for options, problem in (
        ({"targets": ["nothing.*"]}, r"'nothing\.\*' matches no parameter"),
        ({"targets": ["*.phi"]}, "is no kernel of an expert bank or linear layer"),
        ({"targets": ["*.fc1_bias"]}, "is no kernel of an expert bank or linear layer"),
        ({"targets": EXPERTS, "rank": 0}, r"rank=0: choose 1 to 32"),
        ({"targets": EXPERTS, "rank": 33}, r"rank=33: choose 1 to 32"),
        ({"train": ["haed.*"]}, r"'haed\.\*' matches no parameter"),
    ):
        model = tiny()
        with pytest.raises(ValueError, match=problem):
            add_lora(model, **({"rank": 2} | options))
        assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="the model has none of"):
        add_lora(nn.Linear(2, 2), 1)
    model = tiny()
    add_lora(model, 2)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, 2)


def test_the_example_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "lora.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    merged, loaded = names["model"].state_dict(), names["again"].state_dict()
    assert merged.keys() == loaded.keys() == names["base"].keys()
    assert all(torch.equal(value, merged[name]) for name, value in loaded.items())
    assert (merged["head.weight"] != names["base"]["head.weight"]).any()

"""Compute the embeddings of frozen towers once, for training that never runs these towers.

python -m scripts.cache_embeddings --config configs/lit.yaml --out data/pairs_embedded
accelerate launch --num_processes 8 -m scripts.cache_embeddings --config FILE --out DIR

The settings are those of the training run, which then takes `--data.cached_image DIR`, or
`--data.cached_text DIR` for a frozen text tower. Interrupted, the same command goes on with the
shards that are missing.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_pipelines.config import AugmentationConfig
from scripts.cli import parse_config, run
from scripts.cpu_processes import start_cpu_processes
from scripts.train_contrastive import ContrastiveRun, cache_fingerprint

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipelines.image_text import ImageTextLoader
    from data_pipelines.shards import ShardIndex

Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = ("image", "text")


@dataclass
class CacheRun(ContrastiveRun):
    """Settings of the training run, and where its frozen towers' embeddings go."""

    out: str = ""
    """Folder for the embeddings, such as one beside the shards."""
    towers: list[Side] | None = None
    """Towers to cache; null takes all that are frozen."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the stored numbers; float16 takes half the space and rounds them."""
    rows: int = 256
    """Pictures or captions embedded at a time."""


@dataclass
class Plan:
    """The files of one tower: `paths` by shard number, and the shards that have none yet."""

    side: Side
    fingerprint: dict[str, str]
    paths: dict[int, Path]
    missing: list[int]


def main(argv: list[str] | None = None) -> None:
    config = parse_config(CacheRun, argv, __doc__ or "")
    words = sys.argv[1:] if argv is None else argv
    run(lambda: start_cpu_processes("scripts.cache_embeddings", words))
    run(lambda: cache(config))


def cache(config: CacheRun) -> None:
    """Write what is missing in `out`, and say what is there in the end."""
    from contrastive.dual_encoder import build_dual_encoder, model_config
    from contrastive.initial_weights import initialise_towers
    from data_pipelines.image_text import ImageTextLoader
    from data_pipelines.shards import open_shards
    from encoders.text_towers import build_tokenizer

    sides = _frozen_sides(config)
    state, workers = _start(config)
    description = model_config(
        config.image, config.text, config.contrastive, config.train.batch_size
    )
    index = open_shards(config.data)
    whole = replace(config.data, augmentation=AugmentationConfig(crop_scale=(1.0, 1.0)))
    tokenizer = build_tokenizer(description["text_cfg"])
    loader = ImageTextLoader(index, whole, description["vision_cfg"]["image_size"], tokenizer)
    model = build_dual_encoder(description).eval()
    initialise_towers(model, config.image, config.text, description)
    plans = [_plan(config, side, model, description, index) for side in sides]
    state.wait_for_everyone()  # all have looked before the first one writes
    model.to(state.device)
    for plan in plans:
        if state.is_main_process:
            total, new = len(plan.paths), len(plan.missing)
            print(f"frozen {plan.side} tower: {new} of {total} shards to embed", flush=True)
        share = plan.missing[state.process_index :: state.num_processes]
        embed, quiet = _embedder(config, plan.side, model), not state.is_main_process
        _embed_shards(config, plan, share, loader, embed, workers, quiet)
    state.wait_for_everyone()
    if state.is_main_process:
        for plan in plans:
            print(_summary(plan, index, config.out))
        for path in index.truncated:
            print(f"warning: '{path}' ends early; its complete samples are used")
    if state.num_processes > 1:
        state.destroy_process_group()


def _frozen_sides(config: CacheRun) -> Sequence[Side]:
    """The towers to cache, or ValueError for what cannot be cached."""
    from contrastive.cached_towers import refuse_uncached_kind
    from data_pipelines.image_text import refuse_augmentation

    frozen = [side for side in SIDES if getattr(config, side).frozen]
    sides = frozen if config.towers is None else config.towers
    if "text" in sides:
        refuse_uncached_kind(config.text)
    if not sides:
        raise ValueError(
            "no tower is frozen, so none can be cached: set image.frozen or text.frozen, as"
            " configs/lit.yaml and configs/frozen_text.yaml do"
        )
    for side in sides:
        if side not in frozen:
            raise ValueError(f"the {side} tower is trained and cannot be cached: set {side}.frozen")
    if not config.out:
        raise ValueError("no folder for the embeddings: set --out, such as a folder beside shards")
    if config.rows < 1:
        raise ValueError(f"rows must be at least 1, got {config.rows}")
    if "image" in sides:
        refuse_augmentation(config.data.augmentation)
    return sides


def _start(config: CacheRun) -> tuple[Any, int]:
    """Accelerate's state, and how many loader processes each process gets."""
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from training.machine import available_cores, local_processes, plan_cores

    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    # Any process may have to wait for the one with the largest shards.
    state: Any = PartialState(cpu=use_cpu, timeout=timedelta(days=7))
    on_cpu = state.device.type == "cpu"
    if config.train.precision == "fp16" and on_cpu:
        raise ValueError("train.precision fp16 needs a GPU: choose fp32 or bf16")
    plan = plan_cores(
        available_cores(),
        local_processes(state.num_processes),
        device_is_cpu=on_cpu,
        threads=config.train.threads,
        workers=config.data.workers,
    )
    torch.set_num_threads(plan.threads)
    return state, plan.workers


def _plan(
    config: CacheRun, side: Side, model: Any, description: dict[str, Any], index: ShardIndex
) -> Plan:
    """What is to be done for a tower; the same on every process."""
    from data_pipelines.cached_embeddings import embeddings_path, is_finished

    fingerprint = cache_fingerprint(config, model, description, side) | {"dtype": config.dtype}
    paths = {
        number: embeddings_path(config.out, index, number, side)
        for number, size in enumerate(index.sizes)
        if size
    }
    once = {path: number for number, path in paths.items()}  # a shard may be listed twice
    missing = [number for path, number in once.items() if not is_finished(path, fingerprint)]
    return Plan(side, fingerprint, paths, missing)


def _embedder(config: CacheRun, side: Side, model: Any) -> Callable[[Tensor], Tensor]:
    """From uint8 pictures or int64 tokens on the CPU to embeddings there."""
    import torch

    from contrastive.cached_towers import image_embeddings, text_embeddings
    from encoders.pixels import Normalize

    device = next(model.parameters()).device
    settings = model.visual.trunk.pretrained_cfg
    normalize = Normalize(tuple(settings["mean"]), tuple(settings["std"])).to(device)
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.train.precision)

    @torch.inference_mode()
    def embed(inputs: Tensor) -> Tensor:
        found = []
        with torch.autocast(device.type, lower, enabled=lower is not None):
            for part in inputs.split(config.rows):
                part = part.to(device, non_blocking=True)
                rows = (
                    image_embeddings(model, normalize(part))
                    if side == "image"
                    else text_embeddings(model, part)
                )
                found.append(rows.to(getattr(torch, config.dtype)))
        return torch.cat(found).cpu()

    return embed


class _Inputs:
    """What a tower reads of each sample, (rows, ...), or the reason why there is nothing.

    Only the members that the tower reads are fetched; `board` is told what this process is at.
    """

    def __init__(self, loader: ImageTextLoader, side: Side, workers: int) -> None:
        from data_pipelines.captions import members_of
        from data_pipelines.shards import ShardReader
        from data_pipelines.waiting import Board

        config = loader.config
        members = config.image_keys if side == "image" else members_of(config.caption_key)
        self.loader, self.side, self.board = loader, side, Board(workers)
        self.reader = ShardReader(loader.reader.index, members)

    def __getitems__(self, samples: Sequence[int]) -> list[Tensor | str]:
        return [self._read(sample) for sample in self.reader.ahead(samples)]

    def at(self, pid: int) -> str | None:
        """What a process has been at, for messages."""
        sample = self.board.at(pid)
        return None if sample is None else self.reader.index.describe(sample)

    def _read(self, sample: int) -> Tensor | str:
        from data_pipelines.captions import read_captions
        from data_pipelines.shards import FieldError
        from data_pipelines.stream import SkipSample
        from data_pipelines.training_pictures import read_picture

        self.board.start(sample)
        loader = self.loader
        try:
            if self.side == "image":
                data = read_picture(self.reader, sample, loader.config.image_keys)
                return loader.decoded(data)[None]
            return loader.tokenize(read_captions(self.reader, sample, loader.config.caption_key))
        except (FieldError, SkipSample) as reason:
            return str(reason)
        finally:
            self.board.rest()


def _collate(items: list[Tensor | str]) -> tuple[Tensor | None, list[int], dict[int, str]]:
    """All rows, how many each sample has, and reasons by place in the batch."""
    import torch

    rows = [item for item in items if not isinstance(item, str)]
    skipped = {place: item for place, item in enumerate(items) if isinstance(item, str)}
    counts = [0 if isinstance(item, str) else len(item) for item in items]
    return torch.cat(rows) if rows else None, counts, skipped


def _embed_shards(
    config: CacheRun,
    plan: Plan,
    shards: Sequence[int],
    loader: ImageTextLoader,
    embed: Callable[[Tensor], Tensor],
    workers: int,
    quiet: bool,
) -> None:
    """Embed `shards` and write a file for each as soon as it is done."""
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    from data_pipelines.cached_embeddings import write_embeddings
    from data_pipelines.loaders import iterate

    starts = loader.reader.index.starts.tolist()
    batches = {
        shard: [
            range(first, min(first + config.rows, starts[shard + 1]))
            for first in range(starts[shard], starts[shard + 1], config.rows)
        ]
        for shard in shards
    }
    inputs: Any = _Inputs(loader, plan.side, workers)
    sampler: Any = [batch for parts in batches.values() for batch in parts]
    source = iterate(
        DataLoader(inputs, batch_sampler=sampler, num_workers=workers, collate_fn=_collate),
        inputs.at,
        "; the same command goes on with the shards that are missing",
    )
    total = sum(map(len, sampler))
    with tqdm(total=total, unit="sample", desc=plan.side, disable=quiet or None) as bar:
        for shard, parts in batches.items():
            embeddings, counts = list[torch.Tensor](), list[int]()
            skipped: dict[int, str] = {}
            for _ in parts:
                rows, lengths, reasons = next(source)
                skipped |= {len(counts) + place: reason for place, reason in reasons.items()}
                counts += lengths
                if rows is not None:
                    embeddings.append(embed(rows))
                bar.update(len(lengths))
            plan.paths[shard].parent.mkdir(parents=True, exist_ok=True)
            joined = torch.cat(embeddings) if embeddings else torch.empty(0, 0)
            write_embeddings(plan.paths[shard], joined, counts, skipped, plan.fingerprint)


def _summary(plan: Plan, index: ShardIndex, out: str) -> str:
    """One line about all files of a tower."""
    from data_pipelines.cached_embeddings import read_record
    from data_pipelines.shards import describe_skips

    reasons = (read_record(path)["skipped"].values() for path in plan.paths.values())
    skipped = Counter(itertools.chain.from_iterable(reasons))
    line = (
        f"frozen {plan.side} tower: {len(index) - skipped.total()} samples of {len(plan.paths)}"
        f" shards are embedded: train with --data.cached_{plan.side} {out}"
    )
    return f"{line}; {describe_skips(skipped)}" if skipped else line


if __name__ == "__main__":
    main()

"""Retrieval figures of 5,000 pictures and 25,000 captions: ours and CLIP_benchmark's.

python -m benchmarks.evaluation [--images 5000] [--captions 5] [--width 512] [--threads 1]

Each runs in a process of its own; memory is that process's peak above what it had before, with the
features in it. Needs `make peers`; `--only ours --images 100000` does not. The result is kept in
`benchmarks/results/evaluation_<pictures>_cpu.json`, of comparisons and with `--keep`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import resource
import time
from typing import Any

import torch

from benchmarks.machine import RESULTS, machine

KS = (1, 5, 10)


def features(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random pictures (N, d), captions (M, d) and owners (M,)."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(options.images, options.width, generator=rng)
    owner = torch.arange(options.images).repeat_interleave(options.captions)
    text = torch.randn(len(owner), options.width, generator=rng).mul_(4)
    for rows in torch.arange(len(owner)).split(10_000):  # no second copy of all of them
        text[rows] += image[owner[rows]]
    return image, text, owner


def ours(image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    from eval.retrieval import retrieval_metrics

    return retrieval_metrics(image, text, owner, KS)


def clip_benchmark(
    image: torch.Tensor, text: torch.Tensor, owner: torch.Tensor
) -> dict[str, float]:
    peer = importlib.import_module("clip_benchmark.metrics.zeroshot_retrieval")
    batchify, recall_at_k = peer.batchify, peer.recall_at_k

    scores = torch.nn.functional.normalize(text) @ torch.nn.functional.normalize(image).T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owner] = True
    found = {}
    for k in KS:
        for name, s, p in (("image", scores, positive), ("text", scores.T, positive.T)):
            recall = batchify(recall_at_k, s, p, 64, "cpu", k=k) > 0
            found[f"{name}_retrieval_recall@{k}"] = recall.float().mean().item()
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    function = {"ours": ours, "clip_benchmark": clip_benchmark}[name]
    function(*features(argparse.Namespace(**vars(options) | {"images": 20})))  # warms up
    given = features(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    figures = function(*given)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "peak_mib": peak / 1024, "figures": figures}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--only", choices=["ours", "clip_benchmark"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="the result of one alone, too")
    options = parser.parse_args(argv)
    names = [options.only] if options.only else ["ours", "clip_benchmark"]
    results: dict[str, Any] = {"machine": machine("cpu", options.threads), **vars(options)}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(measure, (name, options))
        print(f"{name}: {results[name]['seconds']:.1f} s, {results[name]['peak_mib']:.0f} MiB")
    if not options.only:
        one, two = results["ours"], results["clip_benchmark"]
        equal = all(abs(one["figures"][k] - v) < 1e-6 for k, v in two["figures"].items())
        ratio = two["seconds"] / one["seconds"]
        print(
            f"{'equal figures' if equal else 'FIGURES DIFFER'}; ours is {ratio:.1f} times as fast"
        )
    if options.keep or not options.only:
        path = RESULTS / f"evaluation_{options.images}_cpu.json"
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}")


if __name__ == "__main__":
    main()

"""Say how large a model is and what its routers do.

python -m scripts.inspect_model soft_moe_vit_huge_patch14_224
python -m scripts.inspect_model runs/demo/pretrain --images data/emoji --output routing.png
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.cli import parse_config, run


@dataclass
class Inspection:
    """What to look at."""

    model: str = ""
    """A timm name, a run directory or a checkpoint folder; may stand without `--model`, first."""
    images: str | None = None
    """A folder of pictures or of shards, or a pattern of shards: also draw what routers do there.
    This loads the weights; sizes alone need no memory."""
    output: str = "routing.png"
    """The figure, with images; PNG, PDF or SVG by suffix."""
    count: int = 32
    """Pictures to measure."""
    rows: int = 4
    """Pictures to draw."""
    columns: int = 7
    """Slots to draw."""
    block: int | None = None
    """Block whose slots are drawn; null takes the one whose slots look at the fewest places."""
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    """Members of a sample that may hold its picture."""


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    config = parse_config(Inspection, words, __doc__ or "")
    run(lambda: inspect_model(config))


def inspect_model(config: Inspection) -> None:
    """Print the sizes, and with images the routing figures, and draw them."""
    from data_pipelines.pictures import read_pictures
    from eval.image_tower import open_image_tower

    _check(config)
    tower, pictures = open_image_tower(config.model, weights=False), None
    if config.images is not None:  # read before anything that takes long, for they may be missing
        pictures = read_pictures(config.images, config.count, tower.image_size, config.image_keys)
    print_sizes(tower)
    if pictures is not None:
        print()
        inspect_routing(config, open_image_tower(config.model), pictures)


def _check(config: Inspection) -> None:
    if not config.model:
        raise ValueError("no model given: name a timm model, a run directory or a checkpoint")
    for name in ("count", "rows", "columns"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not config.output.endswith((".png", ".pdf", ".svg")):
        raise ValueError(f"output '{config.output}': choose a name that ends in .png, .pdf or .svg")
    folder = Path(config.output).parent
    if not folder.is_dir():
        raise ValueError(f"output '{config.output}': make the folder '{folder}' first")


def print_sizes(tower: Any) -> None:
    """A table of the model's sizes beside its dense twin's."""
    import timm
    import torch

    from encoders.model_size import measure
    from encoders.variants import DENSE_TWINS
    from eval.tables import text_table

    sizes = {tower.name: measure(tower.model, (tower.image_size, tower.image_size))}
    twin = DENSE_TWINS.get(tower.name)
    if twin is not None:
        arguments = {name: value for name, value in tower.arguments.items() if name != "moe_blocks"}
        sizes_alike = {"num_classes": tower.model.num_classes, "img_size": tower.image_size}
        with torch.device("meta"):
            dense = timm.create_model(twin, **arguments | sizes_alike)
        sizes[twin] = measure(dense, (tower.image_size, tower.image_size))
    table = [_size_rows(size) for size in sizes.values()]
    rows = [[name, *(column[name] for column in table)] for name in table[0]]
    print(text_table([f"{tower.image_size} px, per image", *sizes], rows))
    print(
        "FLOPs: forward, 2 per multiply-add. Activations: what eager torch keeps for the backward"
        "\npass, measured on fake tensors with fused attention, without checkpointing."
    )


def _size_rows(size: Any) -> dict[str, str]:
    from encoders.model_size import TRAINING_BYTES

    share = size.expert_parameters / size.parameters
    return {
        "parameters": _count(size.parameters),
        "  in experts": f"{100 * share:.1f} %",
        "  used by one image, at most": _count(size.image_parameters),
        "  with one expert per layer": _count(size.slot_parameters),
        "GFLOPs": f"{size.flops / 1e9:.2f}",
        "activations, float32": _bytes(size.activation_bytes),
        "activations, bfloat16 autocast": _bytes(size.autocast_activation_bytes),
        "once: bfloat16 copies of weights": _bytes(size.cast_bytes),
        "once: weights, gradients, Adam": _bytes(TRAINING_BYTES * size.parameters),
    }


def inspect_routing(config: Inspection, tower: Any, pictures: Any) -> None:
    """Print a table of routing figures of pictures, uint8 (N, 3, S, S), and draw slot maps."""
    from encoders.pixels import Normalize
    from encoders.routing_inspection import choose_layer, draw_inspection, inspected_layers
    from encoders.routing_statistics import collect_routing, layer_statistics

    inputs = Normalize(tower.mean, tower.std)(pictures)
    routing = collect_routing(tower.model, inputs)
    what = "" if tower.trained else ", untrained"
    print(f"routing of {len(pictures)} pictures by {tower.source}{what}")
    _print_statistics(layer_statistics(tower.model, routing))
    layers = inspected_layers(tower.model, routing)
    if not layers:
        print("no slot maps: the routers of this model have no slots")
        return
    blocks = [layer.block for layer in layers]
    if config.block is not None and config.block not in blocks:
        raise ValueError(f"block {config.block} has no slots: choose from {_join(blocks)}")
    shown = choose_layer(layers) if config.block is None else blocks.index(config.block)
    title = f"{tower.name}{what} · {len(pictures)} pictures"
    figure = draw_inspection(
        pictures, layers, shown, rows=config.rows, columns=config.columns, title=title
    )
    figure.savefig(config.output)
    print(f"figure: {config.output}")


def _print_statistics(statistics: Mapping[str, Mapping[str, float]]) -> None:
    from eval.tables import short, text_table

    names = list(dict.fromkeys(name for layer in statistics.values() for name in layer))
    rows = [
        [layer.removesuffix(".mlp"), *(short(figures.get(name)) for name in names)]
        for layer, figures in statistics.items()
    ]
    print(text_table(["layer", *names], rows))


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 2**10:,.1f} KiB"


def _join(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    main()

"""Open a page in the browser to play with a dual encoder: name a picture, search, look inside.

python -m scripts.app runs/demo/contrastive --images data/emoji/test
python -m scripts.app CHECKPOINT --images 'data/{0000..0099}.tar'

The page is served to this machine only, and asks no other.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.cli import parse_config, run


@dataclass
class App:
    """What the page shows, and to whom."""

    model: str = ""
    """A run directory, a checkpoint or export folder, or the name of an open_clip model; may stand
    without `--model`, first."""
    pretrained: str | None = None
    """Weights tag or file, for open_clip names."""
    images: str | None = None
    """What can be searched: a folder of pictures, a folder of shards, or a pattern of shards."""
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    """Members of a sample that may hold its picture, for shards."""
    caption_key: str | None = "txt"
    """Member with one caption per line, or `json:field`, for shards; null reads none. In folders,
    a.txt holds the captions of a.jpg."""
    labels: list[str] = field(default_factory=list)
    """Labels to start with; none takes captions of a few pictures."""
    templates: list[str] = field(default_factory=lambda: ["{}"])
    """Templates to start with; {} is the label."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 lets in everyone who reaches this machine."""
    port: int = 7860
    """0 takes a free one."""
    max_upload_mb: int = 20
    """Largest file that is taken from a browser, MB."""
    max_pixels: int = 64_000_000
    """Larger pictures are refused, and skipped in the set."""
    exact_limit: int = 1_000_000
    """Up to this many vectors are compared one by one; beyond, faiss finds nearly the nearest."""
    cache: str | None = "~/.cache/softmoe_clip"
    """Folder that keeps embeddings for the next time; null keeps none."""
    batch_size: int = 256
    """Pictures embedded at once."""
    threads: int | None = None
    """CPU threads; null takes all cores."""


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    config = parse_config(App, words, __doc__ or "")
    run(lambda: start(config))


def start(config: App) -> None:
    """Open the model, embed the pictures, and serve until interrupted."""
    _check(config)
    from eval.page_server import LOOPBACK, keep_to_ourselves, listen, serve, web_app

    with (
        listen(config.host, config.port) as server,
        tempfile.TemporaryDirectory(prefix="softmoe_clip_app_") as folder,
    ):
        files = Path(folder)
        keep_to_ourselves(files)
        playground, facts = _open(config)
        from eval.page import build_page, mount_page
        from eval.page_answers import PageOptions

        max_upload = config.max_upload_mb << 20
        options = PageOptions(
            _title(config.model), facts, config.labels, config.templates, max_upload
        )
        blocks = build_page(playground, options, files)
        site = web_app(
            lambda app: mount_page(app, blocks, max_upload), config.host, max_upload, files
        )
        address, port = server.getsockname()[:2]
        address = f"[{address}]" if ":" in address else address
        if config.host not in LOOPBACK:
            print(f"warning: whoever reaches {address}:{port} can use the page")
        print(f"page: http://{address}:{port}   (Ctrl+C ends it)", flush=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that uploads are removed
        serve(site, server)


def _check(config: App) -> None:
    """Raise ValueError for what can be seen without opening anything."""
    from importlib.util import find_spec

    if not config.model:
        raise ValueError("no model given: name a run directory, a checkpoint or an open_clip model")
    for name in ("max_upload_mb", "max_pixels", "exact_limit", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
    if not 0 <= config.port < 1 << 16:
        raise ValueError(f"port must be from 0 to 65535, got {config.port}")
    for template in config.templates:
        if template.count("{}") != 1:
            raise ValueError(f"template '{template}' must have {{}} once, where the label goes")
    if find_spec("gradio") is None:
        raise ValueError("the page needs gradio: pip install 'softmoe-clip[app]'")


def _open(config: App) -> tuple[Any, list[str]]:
    """The playground, and facts about it."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from data_pipelines.picture_sets import open_picture_set
    from data_pipelines.shards import describe_skips
    from eval.collection import build_collection
    from eval.embedder import Embedder
    from eval.open_model import open_model
    from eval.playground import Playground
    from training.machine import available_cores, plan_cores

    state: Any = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    cores = available_cores()
    torch.set_num_threads(config.threads or cores)
    embedder = Embedder(open_model(config.model, config.pretrained), state.device)
    collection = None
    if config.images is not None:
        pictures = open_picture_set(
            config.images, embedder.transform, image_keys=config.image_keys,
            caption_key=config.caption_key, max_pixels=config.max_pixels,
        )  # fmt: skip
        on_cpu = state.device.type == "cpu"  # where the model needs the cores
        collection = build_collection(
            embedder,
            pictures,
            cache=None if config.cache is None else Path(config.cache).expanduser(),
            exact_limit=config.exact_limit,
            batch_size=config.batch_size,
            workers=0 if on_cpu else plan_cores(cores, 1, device_is_cpu=False).workers,
        )
        if collection.skipped:
            print(describe_skips(collection.skipped))
    playground = Playground(embedder, collection, config.max_pixels)
    return playground, _facts(playground, state.device)


def _facts(playground: Any, device: Any) -> list[str]:
    embedder, layers = playground.embedder, playground.layers
    count = sum(parameter.numel() for parameter in embedder.model.parameters())
    facts = [
        f"{count / 1e6:,.1f} million parameters",
        f"{embedder.opened.image_size} x {embedder.opened.image_size} pixels",
        f"{len(layers)} routed layer{'s' if len(layers) != 1 else ''}",
        f"trained with a {'sigmoid' if playground.logits.sigmoid else 'softmax'}",
    ]
    if playground.collection is not None:
        collection = playground.collection
        facts.append(f"{len(collection.numbers):,} pictures, {len(collection.captions):,} captions")
    return [*facts, f"on {device}"]


def _title(model: str) -> str:
    """The last two parts of a path, or the name as it is."""
    return os.path.join(*Path(model).parts[-2:]) if Path(model).exists() else model


if __name__ == "__main__":
    main()

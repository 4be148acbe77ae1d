"""JPEGs of a whole batch decoded on the GPU by nvJPEG, then cropped and resized there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_jpeg

from data_pipelines.config import AugmentationConfig, StreamConfig
from data_pipelines.decode import DecodeError, Picture, decode_rgb
from data_pipelines.shard_reader import Bytes
from data_pipelines.shards import ShardError
from data_pipelines.stream import SkipSample
from data_pipelines.transforms import Box, train_transform


class Undecoded(NamedTuple):
    """A JPEG and what is to be done with it, or a picture that the CPU has finished."""

    data: Bytes
    box: Box
    flip: bool
    finished: Tensor | None = None


class GpuPictures:
    """In place of `TrainingPictures`: loader processes draw the crop and the flip, from the same
    numbers, and `finish` makes the pictures of a batch on `device`.

    What is no plain JPEG is decoded by the loader. nvJPEG's pixels differ from libjpeg's by a few
    steps of 255, as do those of two versions of libjpeg.

    Raises:
        ValueError: no CUDA device, or settings other than crop and flip.
    """

    def __init__(
        self,
        config: StreamConfig,
        augmentation: AugmentationConfig,
        image_size: int,
        device: torch.device | None = None,
    ) -> None:
        if device is None and not torch.cuda.is_available():
            raise ValueError("data.gpu_decoding needs a CUDA device: leave it false")
        self.transform = train_transform(image_size, augmentation)
        if self.transform.steps is not None or config.exif_orientation or config.scaled_decoding:
            raise ValueError(
                "data.gpu_decoding knows crops and flips only: do without the rest of"
                " data.augmentation, data.exif_orientation and data.scaled_decoding"
            )
        self.max_pixels, self.image_size, self.device = config.max_pixels, image_size, device

    def __call__(self, data: Bytes) -> Undecoded:
        """What a loader process does: read the header, draw, and decode what is no plain JPEG.

        Raises:
            SkipSample: a picture that cannot be used, as far as its header tells.
        """
        transform = self.transform
        try:
            picture = Picture(data, self.max_pixels)
            box = transform.draw_box(picture.height, picture.width)
            if not picture.plain_jpeg:
                return Undecoded(b"", box, False, transform(picture.decode(), box))
        except DecodeError as error:
            raise SkipSample(str(error)) from error
        flip = bool(transform.flip and torch.rand(()).item() < transform.flip)
        return Undecoded(data, box, flip)

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `image` uint8 (B, 3, S, S) on the device.

        A JPEG that turns out to be broken only now is counted in `skipped`, and its whole row
        becomes that of the next good one before it (or of the first good one).

        Raises:
            ShardError: all of them are broken.
        """
        # The device is that of the process, which has been chosen by the time of the first batch.
        device = self.device or torch.device("cuda", torch.cuda.current_device())
        entries: list[Undecoded] = batch["image"]
        pictures = self._decode(entries, device)
        good = [number for number, picture in enumerate(pictures) if picture is not None]
        if not good:
            raise ShardError("none of the pictures of a batch can be decoded")
        rows, last = [], good[0]
        for number, picture in enumerate(pictures):
            last = last if picture is None else number
            rows.append(last)
        finished = {
            number: self._place(picture, entries[number], device)
            for number, picture in enumerate(pictures)
            if picture is not None
        }
        skipped = batch.get("skipped", []) + ["broken image"] * (len(entries) - len(good))
        rest = {
            name: value[rows] if isinstance(value, Tensor) else [value[row] for row in rows]
            for name, value in batch.items()
            if name not in ("image", "skipped")
        }
        return rest | {"image": torch.stack([finished[row] for row in rows]), "skipped": skipped}

    def _decode(self, entries: Sequence[Undecoded], device: torch.device) -> list[Tensor | None]:
        """The pictures, whole and of any size, finished ones as they are, None for broken ones."""
        encoded = [
            torch.frombuffer(bytearray(entry.data), dtype=torch.uint8)
            for entry in entries
            if entry.finished is None
        ]
        try:
            decoded: list[Tensor | None] = (
                list(decode_jpeg(encoded, ImageReadMode.RGB, device=device)) if encoded else []
            )
        except RuntimeError:  # one of them is broken, or of a kind that nvJPEG does not know
            decoded = [
                _decode_on_cpu(e.data, self.max_pixels, device)
                for e in entries
                if e.finished is None
            ]
        found = iter(decoded)
        return [next(found) if e.finished is None else e.finished for e in entries]

    def _place(self, picture: Tensor, entry: Undecoded, device: torch.device) -> Tensor:
        """Crop, resize and flip one picture on the device."""
        if entry.finished is not None:
            return picture.to(device, non_blocking=True)
        top, left, height, width = entry.box
        crop = picture[None, :, top : top + height, left : left + width].float()
        size = (self.image_size, self.image_size)
        mode = self.transform.interpolation
        resized = nn.functional.interpolate(crop, size, mode=mode, antialias=True)[0]
        resized = resized.round_().clamp_(0, 255).to(torch.uint8)
        return resized.flip(-1) if entry.flip else resized


def _decode_on_cpu(data: Bytes, max_pixels: int, device: torch.device) -> Tensor | None:
    try:
        return decode_rgb(data, max_pixels).to(device)
    except DecodeError:
        return None

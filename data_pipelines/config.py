"""Settings of the data streams: plain dataclasses, free of heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AugmentationConfig:
    """Training-time changes to a picture: a recipe, what replaces parts of it, and what is added.

    The recipes are `clip` (crops of 90 to 100 % of the area, no flip), `inception` (crops of 5 to
    100 % and a flip with probability 0.5, how Soft MoE was pretrained) and `resize` (the whole
    picture).
    """

    recipe: Literal["clip", "inception", "resize"] = "clip"
    """What crop_scale, crop_ratio, flip and interpolation are where they are null."""
    crop_scale: tuple[float, float] | None = None
    """Smallest and largest share of the picture's area that a crop keeps; [1, 1] only resizes."""
    crop_ratio: tuple[float, float] | None = None
    """Smallest and largest aspect ratio of the crop; without effect when crop_scale is [1, 1]."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """How a crop is resized, with antialias: bicubic, or bilinear in the inception recipe."""
    policy: Literal["none", "rand_augment", "trivial_augment", "auto_augment"] = "none"
    """One of torchvision's policies, after crop and flip: RandAugment, TrivialAugmentWide, or
    AutoAugment's policy for ImageNet."""
    policy_operations: int = 2
    """Operations of rand_augment on each picture."""
    policy_magnitude: int = 10
    """Strength of rand_augment, 0 to 30."""
    erase: float = 0.0
    """Probability of erasing a rectangle (to black), after everything else."""
    rotate: float = 0.0
    """Largest rotation, degrees, in either direction."""
    translate: float = 0.0
    """Largest shift, as a share of the picture's side."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest scale of the affine change; values below 1 show the background."""
    background: int = 255
    """Grey level (0 to 255) behind a rotated, shifted or shrunken picture."""
    brightness: float = 0.0
    """Largest relative change of brightness."""
    contrast: float = 0.0
    """Largest relative change of contrast."""
    saturation: float = 0.0
    """Largest relative change of saturation."""
    channel_mixing: float = 0.0
    """Standard deviation of the share that each colour channel takes from each other one (at most
    0.3); greys stay grey."""
    hue: float = 0.0
    """Largest change of hue, as a share of the colour circle (at most 0.5)."""
    grayscale: float = 0.0
    """Probability of dropping colour."""


@dataclass
class ReadingConfig:
    """How bytes are read, and how often again where that fails."""

    attempts: int = 5
    """Times a read is tried before the sample is skipped; a shard that has just failed as often is
    tried once."""
    backoff: float = 0.5
    """Seconds before the second attempt, doubled before each further one."""
    timeout: float = 30.0
    """Seconds of silence after which a server counts as stalled (http and https)."""


@dataclass
class StreamConfig:
    """Which shards are read, and in what order."""

    shards: str = ""
    """Shard pattern: a path, `{0000..0099}` ranges, `*` globs, several sources joined by `::`; also
    `https://`, `s3://`, `gs://` and `hf://` addresses."""
    weights: list[float] = field(default_factory=list)
    """Share of each `::`-joined source in the stream, in any unit; each source then has epochs of
    its own. Empty: all samples are equal, and each is used once per epoch."""
    with_replacement: bool = False
    """Draw every sample anew (open_clip's `--dataset-resampled`): there are no epochs then, and
    nothing is used exactly once."""
    index_folder: str | None = None
    """Folder for the indexes of shards; null keeps each beside its shard, or in the user's cache
    where that is read-only or remote."""
    on_bad_sample: Literal["skip", "stop"] = "skip"
    """Skip and count samples that cannot be used, or stop with shard, key and reason."""
    max_skipped: float = 0.5
    """Share of skipped samples above which a run stops, after the first hundred samples; 1 never
    does."""
    report_wait: float = 60.0
    """Seconds without a batch after which a line says what is waited for, and again each time."""
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    """Member extensions that hold the picture, the first present one is used."""
    shuffle: bool = True
    """Reshuffle samples every epoch; false reads them in shard order."""
    shuffle_window: int = 200_000
    """Samples that are shuffled together, after shards have been shuffled."""
    workers: int | None = None
    """Loader processes for each training process; null chooses from the cores that are there."""
    max_pixels: int = 64_000_000
    """Pictures with more pixels are skipped and counted."""
    exif_orientation: bool = False
    """Turn photographs upright as their EXIF data say; open_clip and big_vision do not."""
    scaled_decoding: bool = False
    """Let JPEGs whose crop is at least twice the target come out of the decoder at a half, a
    quarter or an eighth of their size: faster, and not quite the same pixels."""
    gpu_decoding: bool = False
    """Decode the JPEGs of each batch on the GPU, with nvJPEG; crops and flips only."""


@dataclass
class ImageTextConfig(StreamConfig):
    """A stream of pictures with captions."""

    caption_key: str = "txt"
    """Member with one caption per line, or `json:field` for a field of the json member; several
    joined by `::` are pooled, and one named twice counts twice."""
    caption_weights: list[float] = field(default_factory=list)
    """One for each field of caption_key: how often its captions are drawn, whatever their number.
    Empty draws from all captions alike."""
    group_key: str | None = None
    """`json:field` (or an extension) whose equal values mark pairs that show the same thing, so
    that the losses do not treat them as negatives of each other; null leaves this off."""
    cached_image: str | None = None
    """Folder of embeddings from scripts.cache_embeddings, streamed in place of pictures; needs
    image.frozen and no augmentation. The default crop does not count, and is not made."""
    cached_text: str | None = None
    """The same of a frozen text tower, in place of captions; needs text.frozen."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)


@dataclass
class ClassificationConfig(StreamConfig):
    """A stream of labelled pictures, from one of three sources: shards, dataset or folder."""

    label_key: str = "cls"
    """Member that holds the label, or `json:field` for a field of the json member; a member `npy`
    holds a vector."""
    labels: Literal["single", "vector", "indices"] = "single"
    """A label is one number, a vector of a number for each class (several may be 1), or a list of
    the classes that apply; the latter two train with soft or several labels."""
    dataset: str = ""
    """A dataset of Hugging Face: a name on the hub, `.parquet` or `.arrow` files (with `*`), or a
    folder of such files, of pictures, or written by `save_to_disk`."""
    dataset_name: str | None = None
    """Which configuration of the dataset, where it has several."""
    split: str = "train"
    """Which split of the dataset."""
    image_column: str = "image"
    label_column: str = "label"
    streaming: bool = False
    """Read the dataset while it is downloaded, in place of downloading it first."""
    samples: int | None = None
    """Rows of a dataset that is streamed, where it does not tell."""
    folder: str = ""
    """A folder with one folder of pictures for each class."""
    classnames: str = ""
    """File with one class name per line; its length is the number of classes. Empty takes the names
    that the dataset or the folders carry."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)

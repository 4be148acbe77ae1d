"""From the settings of an evaluation set to its samples, class names, prompts and tasks.

Everything that can be refused is refused here, before a picture is embedded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from data_pipelines.evaluation import EvaluationSet, SampleSet
from data_pipelines.evaluation_files import (
    EntrySet,
    hugging_face_set,
    image_folder,
    karpathy_split,
)
from data_pipelines.image_folder import class_folders
from eval.config import EvaluationSetConfig
from eval.prompts import (
    canonicalize_text,
    class_prompts,
    read_class_prompts,
    read_classnames,
    read_templates,
)
from eval.subject import Subject
from eval.tasks import NEED_TEXT, NEED_TRAIN, QUICK_PROBES, TASKS

TEMPLATES_FILE = "zeroshot_classification_templates.txt"


@dataclass
class PlannedSet:
    """One set, ready to be measured."""

    name: str
    config: EvaluationSetConfig
    subject: Subject
    tasks: list[str]
    classnames: list[str]
    prompts: list[list[str]]
    test: SampleSet
    train: SampleSet | None


def plan_set(
    config: EvaluationSetConfig, subject: Subject, tasks: list[str] | None = None
) -> PlannedSet:
    """Open the samples of a set and find out what is measured on it.

    Args:
        tasks: of sets that name none of their own.

    Raises:
        ShardError, ValueError: what cannot be measured, and why.
    """
    config = complete(config)
    own = config.tasks or tasks or _implied(config, subject)
    if "retrieval" in own and config.caption_key is None and config.shards:
        config = replace(config, caption_key="txt")
    where = config.data or config.shards
    _check_tasks(own, config, subject, where)
    subject = subject.for_set(config.resize_mode)
    names = read_classnames(config.classnames) if config.classnames else []
    labelled = set(own) - {"retrieval"}
    test = _open(config, subject, config.split, config.shards, names, bool(labelled))
    if "retrieval" in own and not _has_captions(test):
        raise ValueError(f"evaluation set '{where}' has no captions: set caption_key for retrieval")
    train = None
    if set(own) & NEED_TRAIN:
        train = _open(config, subject, config.train_split, config.train_shards, names, True)
        _check_apart(test, train, where)
    own_names = list(getattr(test, "classnames", []))
    if names and own_names and labelled:
        _check_names(names, own_names, where)
    names = names or own_names
    if labelled and not names:
        raise ValueError(f"evaluation set '{where}' has no class names: set classnames")
    for samples in (test, train) if labelled else ():
        _check_labels(samples, names, config.label_kind, where)
    prompts = set_prompts(config, names) if "zero_shot_classification" in own else []
    name = config.name or Path(config.data or Path(config.shards).parent).name
    return PlannedSet(name, config, subject, own, names, prompts, test, train)


def set_prompts(config: EvaluationSetConfig, classnames: list[str]) -> list[list[str]]:
    """C lists of prompts from the templates or the prompt file of a set.

    Raises:
        ValueError: both are given, or what they hold is unusable.
    """
    if config.class_prompts:
        if config.templates != EvaluationSetConfig().templates:
            raise ValueError(
                f"evaluation set '{config.shards}' has both templates and class_prompts: set one"
            )
        return read_class_prompts(config.class_prompts, classnames, config.canonicalize)
    return class_prompts(classnames, set_templates(config), config.canonicalize)


def set_templates(config: EvaluationSetConfig) -> list[str]:
    """The templates of a set, read from where it names.

    Raises:
        ValueError: the file or its name is unusable.
    """
    templates = config.templates
    known = ("builtin:", "open_clip:")
    if len(templates) == 1 and (templates[0].startswith(known) or Path(templates[0]).is_file()):
        return read_templates(templates[0])
    return templates


def complete(config: EvaluationSetConfig) -> EvaluationSetConfig:
    """Fill in what a folder in CLIP_benchmark's layout says about itself."""
    if not config.data or config.shards:
        return config
    root = Path(config.data)
    if not list(root.glob(f"{config.split}/*.tar")):
        return config
    found = replace(config, shards=f"{root}/{config.split}/*.tar", data="")
    found.name = config.name or root.name
    if not config.classnames and (root / "classnames.txt").is_file():
        found.classnames = str(root / "classnames.txt")
    if config.templates == EvaluationSetConfig().templates and (root / TEMPLATES_FILE).is_file():
        found.templates = [str(root / TEMPLATES_FILE)]
    if list(root.glob(f"{config.train_split}/*.tar")) and not config.train_shards:
        found.train_shards = f"{root}/{config.train_split}/*.tar"
    if config.caption_key is None and not found.classnames:
        found.caption_key = "txt"
    return found


def _implied(config: EvaluationSetConfig, subject: Subject) -> list[str]:
    """What a set asks for by its other settings; of a model without texts, the probes that are
    quick to learn, where there is something to learn them from."""
    if subject.encode_text is None:
        probed = config.label_kind == "single" and _has_training_split(config)
        return list(QUICK_PROBES) if probed else []
    named = {"zero_shot_classification": config.classnames, "retrieval": config.caption_key}
    return [task for task, setting in named.items() if setting]


def _has_training_split(config: EvaluationSetConfig) -> bool:
    """As far as that can be seen before the set is opened: tables show it then."""
    if config.shards:
        return bool(config.train_shards)
    path = Path(config.data)
    if path.suffix == ".json":
        return False  # Karpathy's files have no labels
    return _is_dataset(path) or (path / config.train_split).is_dir()


def _is_dataset(path: Path) -> bool:
    """Whether `datasets` opens a path: a name that is no folder, what it saved, or a folder with
    tables, no deeper than the hub keeps them, for a tree of pictures takes long to go through."""
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    tables = ("*.parquet", "*/*.parquet", "data/*/*.parquet")
    return saved or not path.is_dir() or any(any(path.glob(pattern)) for pattern in tables)


def _check_tasks(
    tasks: list[str], config: EvaluationSetConfig, subject: Subject, where: str
) -> None:
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"task '{unknown[0]}' is unknown: choose from {', '.join(TASKS)}")
    if not tasks and subject.encode_text is None:
        raise ValueError(
            f"evaluation set '{where}' measures nothing: model '{subject.name}' has no text tower,"
            " and probes need single labels and a training split: set train_shards, or give the"
            f" folder of '{config.split}' one called '{config.train_split}' beside it"
        )
    if not tasks:
        missing = config.data and not Path(config.data).exists()
        raise ValueError(
            f"evaluation set '{where}'{', which is no folder here,' * bool(missing)} measures"
            " nothing: set classnames for zero-shot classification, caption_key for retrieval, or"
            " tasks"
        )
    if config.class_prompts and not config.classnames:
        raise ValueError(
            f"class_prompts '{config.class_prompts}' needs classnames, the file that orders"
            " the labels"
        )
    blind = [task for task in tasks if task in NEED_TEXT]
    if blind and subject.encode_text is None:
        raise ValueError(f"model '{subject.name}' has no text tower: {blind[0]} needs one")
    if any(k < 1 for k in config.recall_ks):
        raise ValueError(f"every k must be at least 1, got {config.recall_ks}")
    if set(tasks) & NEED_TRAIN and config.shards and not config.train_shards:
        raise ValueError(f"evaluation set '{where}': probes learn from train_shards: set them")
    if set(tasks) & NEED_TRAIN and config.label_kind != "single":
        raise ValueError("probes need label_kind single")


def _open(
    config: EvaluationSetConfig,
    subject: Subject,
    split: str,
    shards: str,
    names: list[str],
    labelled: bool,
) -> SampleSet:
    transform, upright = subject.transform, config.exif_orientation
    if shards:
        if labelled and not names:
            raise ValueError(f"evaluation set '{shards}' has no class names: set classnames")
        samples = EvaluationSet(
            shards,
            8,
            image_keys=config.image_keys,
            caption_key=config.caption_key,
            label_key=config.label_key if labelled else None,
            classnames=names,
            several=config.label_kind != "single",
            exif_orientation=upright,
        )
        samples.transform = transform
        return samples
    path = Path(config.data)
    if path.suffix == ".json":
        return karpathy_split(config.data, config.images, split, transform, upright)
    if _is_dataset(path):
        label = config.label_key if labelled else None
        if label == EvaluationSetConfig().label_key:
            label = "label"  # the usual name of the column
        several = config.label_kind != "single"
        return hugging_face_set(
            config.data, split, transform, label, config.caption_key, names, several, upright
        )
    if not (path / split).is_dir():
        return image_folder(config.data, transform, None, names, upright)
    # A class without a picture in one split must not shift the labels of the others.
    splits = (config.split, config.train_split)
    folders = sorted({name for part in splits for name in class_folders(path / part)})
    return image_folder(str(path / split), transform, folders, names, upright)


def _check_apart(test: SampleSet, train: SampleSet, where: str) -> None:
    """Probes must not learn from the pictures that they are tested on."""
    if isinstance(test, EvaluationSet) and isinstance(train, EvaluationSet):
        same = bool({*test.index.paths} & {*train.index.paths})
    else:
        same = isinstance(test, EntrySet) and isinstance(train, EntrySet) and _equal(test, train)
    if same:
        raise ValueError(
            f"evaluation set '{where}' has one split for learning and testing: give it a"
            " folder or a split for each (split, train_split, train_shards)"
        )


def _equal(one: EntrySet, other: EntrySet) -> bool:
    """Whether both hold the same samples. Pictures are read where all else is the same, and up to
    the first that differ: splits are told apart without reading them."""
    lists = [[(e.key, e.captions, e.labels) for e in samples.entries] for samples in (one, other)]
    pairs = zip(one.entries, other.entries, strict=False)
    return lists[0] == lists[1] and all(a.content() == b.content() for a, b in pairs)


def _check_names(given: list[str], own: list[str], where: str) -> None:
    """Class names that are given must be as many as the set's own, and in their order."""
    if len(given) != len(own):
        raise ValueError(
            f"evaluation set '{where}' has {len(own)} classes, but classnames has {len(given)}"
        )
    one, two = ([canonicalize_text(name) for name in names] for names in (given, own))
    if one != two and sorted(one) == sorted(two):
        place = next(i for i, names in enumerate(zip(one, two, strict=True)) if len({*names}) > 1)
        raise ValueError(
            f"evaluation set '{where}' calls label {place} '{own[place]}', but classnames"
            f" '{given[place]}': leave classnames out, or give them in the set's order"
        )


def _has_captions(samples: SampleSet) -> bool:
    if isinstance(samples, EvaluationSet):
        return samples.caption_key is not None
    return not isinstance(samples, EntrySet) or any(entry.captions for entry in samples.entries)


def _check_labels(samples: SampleSet | None, names: list[str], kind: str, where: str) -> None:
    """Labels must have names; those of remote shards show when they are embedded."""
    if isinstance(samples, EvaluationSet) and not samples.remote:
        samples.check_labels()
    if isinstance(samples, EntrySet):
        bare = sum(not entry.labels for entry in samples.entries)
        if bare and kind == "single":
            raise ValueError(
                f"{bare} of {len(samples)} samples of evaluation set '{where}' have no label: set"
                " label_key, or a split that has labels"
            )
        outside = {n for entry in samples.entries for n in entry.labels} - {*range(len(names))}
        if outside:
            raise ValueError(
                f"evaluation set '{where}' has label {max(outside)}, but there are {len(names)}"
                " classes: give the names that belong to the labels"
            )

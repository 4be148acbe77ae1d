"""Class names become the prompts of zero-shot classification, by templates or from a file."""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from data_pipelines.classification import read_lines

LABEL_SETS = Path(__file__).with_name("label_sets.json")
_PLACEHOLDER = "{}"
_NAMED_PLACEHOLDER = "{c}"
_DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize_text(text: str, keep: str | None = None) -> str:
    """Lower-case `text`, drop ASCII punctuation and collapse white space, as big_vision does.

    Underscores become spaces first; hyphens and apostrophes are deleted, not spaced. Text towers
    trained on cased, punctuated captions want this off.

    Args:
        text: Any string.
        keep: An exact string that survives, such as "{}" in templates or "," in class names.

    Source: google-research/big_vision, `evaluators/proj/image_text/prompt_engineering.py`.
    """
    text = text.replace("_", " ")
    parts = text.split(keep) if keep else [text]
    text = (keep or "").join(part.translate(_DELETE_PUNCTUATION) for part in parts)
    return " ".join(text.lower().split())


def read_classnames(path: str | Path) -> list[str]:
    """Read class names from a UTF-8 text file, line i naming label i.

    Raises:
        ValueError: the file is missing or has no line, or an empty line that would leave a label
            nameless.
    """
    family, _, name = str(path).partition(":")
    if family == "builtin":
        return builtin_labels(name)["classes"]
    if str(path) == "open_clip:imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES)
    return read_lines(path)


def builtin_labels(name: str) -> dict[str, list[str]]:
    """`classes` and `templates` of a well-known data set, from `label_sets.json`.

    Raises:
        ValueError: an unknown name.
    """
    sets = json.loads(LABEL_SETS.read_text(encoding="utf-8"))["sets"]
    if name not in sets:
        raise ValueError(f"no built-in class names '{name}': there are {', '.join(sets)}")
    return sets[name]


def _known_templates(path: str) -> list[str] | None:
    """Templates of `builtin:NAME`, `open_clip:80` or `open_clip:7`; None for a file."""
    family, _, name = path.partition(":")
    if family == "builtin":
        return builtin_labels(name)["templates"]
    if path not in ("open_clip:80", "open_clip:7"):
        return None
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    templates = OPENAI_IMAGENET_TEMPLATES if name == "80" else SIMPLE_IMAGENET_TEMPLATES
    return [template("{}") for template in templates]


def read_templates(path: str | Path) -> list[str]:
    """Read prompt templates from a UTF-8 text file, one per line, and return them with `{}`.

    The class name goes where `{}` stands, or `{c}` as in the files of CLIP_benchmark.

    Raises:
        ValueError: the file or a line is empty, or a line does not have exactly one placeholder.
    """
    known = _known_templates(str(path))
    if known is not None:
        return known
    lines = read_lines(path)
    return [_one_placeholder(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]


def read_class_prompts(
    path: str | Path, classnames: Sequence[str], canonicalize: bool = False
) -> list[list[str]]:
    """Read every class's own prompts from a JSON file, `{class name: [prompt, ...]}`.

    This is the layout of the files published with CuPL (Pratt et al., 2023, arXiv 2209.03320).

    Args:
        path: UTF-8 file; its order does not matter, and classes may differ in prompts.
        classnames: C names, in label order; the file names these and no others.
        canonicalize: Pass the prompts through `canonicalize_text`.

    Returns:
        C lists of prompts.

    Raises:
        ValueError: the file is missing or laid out otherwise, a class is missing, unknown or there
            twice, or a class has no prompts or an empty one.
    """
    found = _read_prompt_file(path)
    missing = [name for name in classnames if name not in found]
    if missing:
        raise ValueError(f"'{path}' has no prompts for {_some(missing)}: add them")
    known = set(classnames)
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ValueError(
            f"'{path}' has prompts for {_some(unknown)}, not among the {len(known)} classnames:"
            " remove them, or name the file that belongs to classnames"
        )
    prompts = []
    for name in classnames:
        texts = found[name]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"'{path}', class '{name}': its prompts must be a list of strings")
        texts = [canonicalize_text(text) if canonicalize else text.strip() for text in texts]
        if not texts or "" in texts:
            what = "an empty prompt" if texts else "no prompt"
            raise ValueError(f"'{path}', class '{name}' has {what}: write at least one, none empty")
        prompts.append(texts)
    return prompts


def _read_prompt_file(path: str | Path) -> dict[str, Any]:
    layout = 'it should hold {"class name": ["prompt", ...], ...}'

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # of two, json keeps the last
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"{_some(twice)} twice")
        return dict(pairs)

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        found = json.loads(text, object_pairs_hook=unique)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"class_prompts '{path}' is not a file: {layout}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' cannot be read ({error}): {layout}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds no JSON object: {layout}")
    return found


def _some(names: Sequence[str]) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{names[0]}'{more}"


def class_prompts(
    classnames: Sequence[str],
    templates: Sequence[str],
    canonicalize: bool = False,
    *,
    aliases: Literal["first", "all", "none"] = "none",
) -> list[list[str]]:
    """Fill every template with every class name.

    Args:
        classnames: C names, in label order; a name may list aliases separated by commas.
        templates: Strings with exactly one `{}` or `{c}`.
        canonicalize: Pass names and templates through `canonicalize_text`, keeping the commas of
            the names and the placeholders of the templates.
        aliases: "none" takes a name as it stands, commas included; "first" takes what precedes
            the first comma (the default of big_vision); "all" gives every alias its prompts,
            which share one class vector.

    Returns:
        C lists of prompts, alias by alias and template by template.

    Raises:
        ValueError: no template, a bad template, an unknown `aliases`, or a class left without
            a name (the message says which).
    """
    if not templates:
        raise ValueError('no prompt templates; pass at least one, such as "a photo of a {}."')
    forms = [_one_placeholder(text, f"template {text!r}") for text in templates]
    if canonicalize:
        forms = [canonicalize_text(form, keep=_PLACEHOLDER) for form in forms]
    prompts = []
    for index, classname in enumerate(classnames):
        names = _split_aliases(
            canonicalize_text(classname, keep=",") if canonicalize else classname, aliases
        )
        if not names:
            raise ValueError(f"class {index} ({classname!r}) has no name to put into a prompt")
        prompts.append([form.replace(_PLACEHOLDER, name) for name in names for form in forms])
    return prompts


def _split_aliases(name: str, aliases: str) -> list[str]:
    if aliases not in ("first", "all", "none"):
        raise ValueError(f'aliases must be "first", "all" or "none", got {aliases!r}')
    parts = [name] if aliases == "none" else name.split(",")
    names = [part.strip() for part in parts if part.strip()]
    return names[:1] if aliases == "first" else names


def _one_placeholder(template: str, where: str) -> str:
    """Return `template` with its one placeholder written `{}`."""
    count = template.count(_PLACEHOLDER) + template.count(_NAMED_PLACEHOLDER)
    if count != 1:
        raise ValueError(
            f"{where}: {count} placeholders; write {_PLACEHOLDER} exactly once, "
            "where the class name goes"
        )
    return template.replace(_NAMED_PLACEHOLDER, _PLACEHOLDER)

"""Command lines: `--config FILE.yaml` and dotted overrides, with errors of one line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

T = TypeVar("T")
EXIT_USAGE = 2


def fail(message: str, code: int = EXIT_USAGE) -> NoReturn:
    """Print one line and stop."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def parse_config(run_config: Callable[..., T], argv: Sequence[str] | None, description: str) -> T:
    """Build a run configuration (a dataclass of dataclasses) from the command line.

    Values come from the dataclass, then from `--config`, then from `--a.b value` options. An
    unknown key, a wrong type or a missing file ends the process with one line and exit code 2.
    """
    parser = _parser(run_config, description)
    argv = list(sys.argv[1:] if argv is None else argv)
    _check_config_files(argv)
    try:
        parsed = parser.parse_args(argv)
        values = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        fail(_explain(str(error), _known_keys(parser)))
    return run_config(**{item.name: values[item.name] for item in fields(cast(Any, run_config))})


def save_config(run_config: Any, path: Path, description: str = "") -> None:
    """Write a run configuration as YAML that `--config` reads back to the same values."""
    import yaml

    header = f"# {description}\n" if description else ""
    path.write_text(header + yaml.safe_dump(_plain(asdict(run_config)), sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _parser(run_config: Any, description: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with settings.")
    parser.add_class_arguments(run_config)
    return parser


def _check_config_files(argv: list[str]) -> None:
    for position, word in enumerate(argv):
        name = None
        if word == "--config" and position + 1 < len(argv):
            name = argv[position + 1]
        elif word.startswith("--config="):
            name = word.partition("=")[2]
        if name is not None and not Path(name).is_file():
            presets = sorted(str(path) for path in Path("configs").glob("*.yaml"))
            near = difflib.get_close_matches(name, presets, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            fail(f"--config {name}: there is no such file{hint}")


def _known_keys(parser: ArgumentParser) -> list[str]:
    keys = [action.dest for action in parser._actions]
    return [key for key in keys if key not in ("help", "config", "print_config")]


def _explain(message: str, known: list[str]) -> str:
    """Shorten a parser message to one line and add the nearest right name."""
    line = " ".join(message.split())
    nested = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line)
    item = re.search(r"Parser key \"([\w.]+)\".*Option '(\w+)' is not accepted", line)
    plain = re.search(r"[Uu]nrecognized arguments: --([\w.]+)|^Option '([\w.]+)' is not acc", line)
    if nested is not None:
        return _suggest(".".join(nested.groups()), known)
    if item is not None:  # an entry of a list: only the last part of a name can be compared
        near = difflib.get_close_matches(item[2], [k.rpartition(".")[2] for k in known], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown setting '{item[2]}' in '{item[1]}'{hint}"
    if plain is not None:
        return _suggest(plain[1] or plain[2], known)
    return line.replace("Parser key ", "").replace("<class '", "").replace("'>", "")


def _suggest(key: str, known: list[str]) -> str:
    """The message for an unknown key: the nearest known one, by full name or by last part."""
    near = difflib.get_close_matches(key, known, n=1)
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in known}
        best = difflib.get_close_matches(key.rpartition(".")[2], list(leaves), n=1)
        near = [leaves[name] for name in best]
    return f"unknown setting '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")


def run(main: Callable[[], object]) -> None:
    """Call `main`; errors that a user can mend become one line and exit code 2."""
    from training.loop import NonFiniteError

    try:
        main()
    except (ValueError, FileNotFoundError, PermissionError, NonFiniteError) as error:
        fail(" ".join(str(error).split()), EXIT_USAGE if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None

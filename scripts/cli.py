"""Command lines: `--config FILE.yaml` and dotted overrides, with errors of one line."""

from __future__ import annotations

import difflib
import os
import re
import select
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

T = TypeVar("T")
EXIT_USAGE, EXIT_PIPE = 2, 141  # the latter as of a command that SIGPIPE ends
# Of jsonargparse's messages.
PHRASES = {"Parser key ": "", "<class '": "", "'>": "", "Expected a int": "Expected an int"}
# Names that other projects give a setting.
ALIASES = {"learning_rate": "lr", "epochs": "steps", "wd": "weight_decay", "warmup": "warmup_steps"}
ROOT = Path(__file__).resolve().parents[1]
OURS = {
    "classification", "contrastive", "data_pipelines", "encoders", "eval", "scripts", "training",
}  # fmt: skip


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
        _check_groups(run_config(), parsed)
        values = parser.instantiate(parsed)
    except (ArgumentError, TypeError, ValueError) as error:
        fail(_explain(str(error), _known_keys(parser)))
    return run_config(**{item.name: values[item.name] for item in fields(cast(Any, run_config))})


def save_config(run_config: Any, path: Path, description: str = "") -> None:
    """Write a run configuration as YAML that `--config` reads back to the same values."""
    import yaml

    header = f"# {description}\n" if description else ""
    partial = path.with_name(path.name + ".partial")
    text = header + yaml.safe_dump(plain_settings(run_config), sort_keys=False)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)  # a kill in between leaves the file that was there


def plain_settings(run_config: Any) -> dict[str, Any]:
    """A run configuration as nested dicts and lists of plain values."""
    return _plain(asdict(run_config))


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
        if name is not None and Path(name).is_dir():
            fail(f"--config {name}: is a folder; name a YAML file in it")
        if name is not None and not Path(name).is_file():
            presets = sorted(str(path) for path in Path("configs").glob("*.yaml"))
            near = difflib.get_close_matches(name, presets, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            fail(f"--config {name}: there is no such file{hint}")
        if name is not None:
            try:
                Path(name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                fail(f"--config {name}: is no text, and so no YAML file")


def _check_groups(defaults: Any, values: Namespace, prefix: str = "") -> None:
    """Raise ValueError where a file has a single value in the place of a group of settings."""
    for item in fields(defaults):
        default, value = getattr(defaults, item.name), values[item.name]
        if is_dataclass(default):
            name = f"{prefix}{item.name}"
            if not isinstance(value, Namespace):
                raise ValueError(_group_message(name, value))
            _check_groups(default, value, f"{name}.")


def _group_message(name: str, value: object) -> str:
    return f"{name}: expected settings, got {'null' if value is None else value}"


def _known_keys(parser: ArgumentParser) -> list[str]:
    keys = [action.dest for action in parser._actions]
    return [key for key in keys if key not in ("help", "config", "print_config")]


def _explain(message: str, known: list[str]) -> str:
    """Shorten a parser message to one line and add the nearest right name."""
    line = " ".join(message.split())
    nested = re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line)
    item = re.search(r"Parser key \"([\w.]+)\".*Option '(\w+)' is not accepted", line)
    plain = re.search(r"[Uu]nrecognized arguments: --([\w.]+)|^Option '([\w.]+)' is not acc", line)
    group = re.search(r"\"([\w.]+)\": Unable to load config '(.*?)'", line)
    entry = re.search(r"\"([\w.]+)\": Not a valid subclass .* Got value: (.*?) Subclass ty", line)
    if group is not None or entry is not None:
        return _group_message(*(group or cast(re.Match[str], entry)).groups())
    if "Expected a dot import path string" in line:
        name = re.search(r"\"([\w.]+)\"", line)
        return f"{name[1] if name else 'a list'}: cannot be read; quote it: '[{{\"name\": ...}}]'"
    if nested is not None:
        return _suggest(".".join(nested.groups()), known)
    if item is not None:  # an entry of a list: only the last part of a name can be compared
        near = difflib.get_close_matches(item[2], [k.rpartition(".")[2] for k in known], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown setting '{item[2]}' in '{item[1]}'{hint}"
    if plain is not None:
        return _suggest(plain[1] or plain[2], known)
    for clumsy, plain_words in PHRASES.items():
        line = line.replace(clumsy, plain_words)
    return line


def _suggest(key: str, known: list[str]) -> str:
    """The message for an unknown key: the nearest known one, by full name or by last part."""
    group, _, last = key.rpartition(".")
    alias = f"{group}.{ALIASES.get(last)}".removeprefix(".")
    near = [alias] if alias in known else difflib.get_close_matches(key, known, n=1)
    if not near:
        leaves = {name.rpartition(".")[2]: name for name in known}
        best = difflib.get_close_matches(key.rpartition(".")[2], list(leaves), n=1)
        near = [leaves[name] for name in best]
    return f"unknown setting '{key}'" + (f"; did you mean '{near[0]}'?" if near else "")


def run(main: Callable[[], object]) -> None:
    """Call `main`; errors that we raise for the user become one line and exit code 2.

    Errors of the libraries keep their traceback, for a user cannot tell what they are about.
    """
    try:
        _check_owners()
        # Torch's advice on loaders: their number is the user's, or planned from the cores.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        main()
        sys.stdout.flush()
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            raise SystemExit(EXIT_PIPE) from None
        if not _is_for_the_user(error):
            raise
        fail(" ".join(str(error).split()), EXIT_USAGE if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _reader_has_gone() -> bool:
    """Whether what reads our output, such as `head`, has seen enough; nothing is written then."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _check_owners() -> None:
    """Raise ValueError where another project's package is found by the name of one of ours."""
    for name in sorted(OURS):
        spec = find_spec(name)
        origin = "nowhere" if spec is None else str(spec.origin)
        if spec is None or spec.origin is None or not Path(origin).resolve().is_relative_to(ROOT):
            raise ValueError(
                f"the package '{name}' is found in {origin} and not in {ROOT}: uninstall the other"
                " project of that name, or run in a virtual environment of this one's"
            )


def _is_for_the_user(error: Exception) -> bool:
    """Whether we have defined the error, or raised one of a kind that users can mend."""
    if type(error).__module__.partition(".")[0] in OURS:
        return True
    if not isinstance(error, ValueError | FileNotFoundError | PermissionError):
        return False
    # A path that cannot be opened is named in the message, whatever opened it for us.
    passed_over = ("os", "pathlib", "shutil") if isinstance(error, OSError) else ()
    files = [
        frame.f_code.co_filename
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in passed_over
    ]
    innermost = Path(files[-1]).resolve()
    return innermost.is_relative_to(ROOT) and innermost.relative_to(ROOT).parts[0] in OURS

"""Compare two or more evaluated models: figures, intervals and which differences are significant.

python -m scripts.compare_evaluations --results runs/a/results runs/b/results
"""

from __future__ import annotations

import argparse

from scripts.cli import run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--results", nargs="+", required=True, metavar="FOLDER",
        help="folders that scripts.evaluate --results wrote; the first is what others differ from",
    )  # fmt: skip
    parser.add_argument("--output", help="Markdown file for the table")
    options = parser.parse_args(argv)
    run(lambda: compare(options.results, options.output))


def compare(folders: list[str], output: str | None = None) -> str:
    """Print and return the table."""
    from pathlib import Path

    from eval.comparison import comparison_table
    from eval.records import write_text

    table = comparison_table(folders)
    print(table)
    if output is not None:
        write_text(Path(output), table)
    return table


if __name__ == "__main__":
    main()

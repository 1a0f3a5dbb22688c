"""Tables and progress for people: rich in a terminal when it is installed, plain text everywhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Callable


def rich_console() -> Any | None:
    """A rich Console, or None when stdout is no terminal or rich is not installed."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows under columns; numbers and everything else are shown by str()."""
    cells = [[str(cell) for cell in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    console = rich_console()
    if console is not None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
        )
        for i, column in enumerate(columns):
            # Headers may break between words, cells may not break at all.
            width = max(map(len, [*column.split(), *(row[i] for row in cells)]))
            table.add_column(column, justify="right" if numeric[i] else "left", min_width=width)
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        return
    widths = [max([len(column), *(len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    print(title)
    for row in [list(columns), ["-" * width for width in widths], *cells]:
        aligned = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric))
        print("  " + "  ".join(aligned).rstrip())
    print()


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").split(" ")[0])
    except ValueError:
        return text == "-"
    return True


_STATUS_STYLES = {"ok": "green", "info": "cyan", "warning": "yellow", "failure": "bold red"}


def print_status(status: str, name: str, detail: str, advice: str = "") -> None:
    """One line of a check list, and what to do in a second line. status: ok, info, warning or failure."""
    console = rich_console()
    lines = [(f"{status:<8}", f"{name:<20} {detail}")] + ([(" " * 8, f"-> {advice}")] if advice else [])
    for label, text in lines:
        if console is None:
            print(f"{label} {text}", flush=True)
        else:
            from rich.text import Text

            console.print(Text.assemble((label, _STATUS_STYLES[status]), " ", text), soft_wrap=True)


@contextlib.contextmanager
def progress_bar(description: str | None, total: int, unit: str = "") -> Iterator[Callable[..., None]]:
    """Yields advance(amount, description=None), which moves a bar, or prints lines without rich or terminal.

    Args:
        description: the text beside the bar, which `advance` may change. None: nothing is shown.
        total: what the amounts add up to.
        unit: "bytes" shows megabytes and their rate, "" the count.
    """
    if description is None:
        yield lambda amount, description=None: None
        return
    console = rich_console()
    if console is None:
        yield _progress_in_lines(description, total, unit)
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), *amounts, TimeRemainingColumn()]
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda amount, description=None: progress.update(task, advance=amount, description=description)


def _progress_in_lines(label: str, total: int, unit: str) -> Callable[..., None]:
    """A line for each tenth of the way."""
    done, shown = 0, 0

    def advance(amount: int, description: str | None = None) -> None:
        nonlocal done, shown, label
        done, label = done + amount, label if description is None else description
        tenths = 10 * done // total if total else 10
        if tenths > shown:
            shown = tenths
            sizes = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB" if unit == "bytes" else f"{done} of {total}"
            print(f"{label}: {10 * tenths} % ({sizes})", flush=True)

    return advance

"""Results for people: sentences and tables, and these as text."""

from collections.abc import Mapping, Sequence
from typing import Any

Table = Sequence[Sequence[Any]]  # rows of cells; the first row names the columns
Part = str | Table  # a sentence, which is the title of the table after it if it ends with a colon


def text_of(parts: Sequence[Part]) -> str:
    """Returns sentences and tables as lines, with an empty line before the title of a table."""
    lines: list[str] = []
    for part in parts:
        if isinstance(part, str):
            lines += [""] * bool(lines and part.endswith(":")) + [part]
        else:
            lines.append(aligned(part))
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[Any]]) -> str:
    """Returns rows of cells as lines with aligned columns: the first to the left, others right."""
    cells = [[cell_text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def cell_text(cell: Any) -> str:
    """Returns a number with two decimals, text as it is, and a dash for None."""
    if cell is None:
        return "-"
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def papers_table(numbers: Mapping[str, Mapping[str, float]]) -> Table:
    """Returns the numbers of papers by network and method as a table."""
    methods = list(dict.fromkeys(name for own in numbers.values() for name in own))
    rows = [[network, *map(own.get, methods)] for network, own in numbers.items()]
    return [["", *methods], *rows]


def percent(share: float | None) -> float | None:
    """Returns a share in percent; None remains None."""
    return None if share is None else 100 * share


def standard_error(share: float, count: int) -> float:
    """Returns the standard error of a share of `count` independent cases, such as an accuracy."""
    return (share * (1 - share) / count) ** 0.5

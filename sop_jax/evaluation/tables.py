"""Tables of results for people."""

from collections.abc import Mapping, Sequence
from typing import Any


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


def papers_text(numbers: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the numbers of papers by network and method as a table."""
    methods = list(dict.fromkeys(name for own in numbers.values() for name in own))
    rows = [[network, *map(own.get, methods)] for network, own in numbers.items()]
    return aligned([["", *methods], *rows])


def percent(share: float | None) -> float | None:
    """Returns a share in percent; None remains None."""
    return None if share is None else 100 * share


def standard_error(share: float, count: int) -> float:
    """Returns the standard error of a share of `count` independent cases, such as an accuracy."""
    return (share * (1 - share) / count) ** 0.5

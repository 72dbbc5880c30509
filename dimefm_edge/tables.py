"""Plain text tables for terminals, pipes and logs alike."""

from __future__ import annotations

from collections.abc import Sequence

Cell = str | float | int | bool | None


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Align columns: numbers to the right with three or more digits, text to the left.

    Args:
        headers: One per column.
        rows: Cells; None is shown as a dash.

    Returns:
        Lines without trailing spaces.
    """
    texts = [[format_cell(cell) for cell in row] for row in rows]
    is_number = [
        any(_is_number(row[i]) for row in rows)
        and all(row[i] is None or _is_number(row[i]) for row in rows)
        for i in range(len(headers))
    ]
    widths = [max(len(line[i]) for line in [list(headers), *texts]) for i in range(len(headers))]
    rule = ["-" * width for width in widths]
    lines = []
    for line in [list(headers), rule, *texts]:
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, is_number, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def format_cell(cell: Cell) -> str:
    """A cell as text: three digits of a fraction, whole numbers from 1000 on, a dash for None."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return str(cell)

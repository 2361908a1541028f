"""Tables as text for people."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Rows of cells as lines; `sides` has "<" or ">" for each column."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(sides))]
    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)

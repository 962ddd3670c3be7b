"""Tables for a terminal that show every number whole, however narrow the terminal is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["EMPTY", "TableColumn", "fitted"]

EMPTY = "-"


@dataclass(frozen=True)
class TableColumn:
    """A column of a table.

    Attributes:
        heading: its title.
        cells: one per row.
        rank: columns with a high rank are left out first; those with rank 0 always stay.
        is_name: whether its cells are texts, which stand on the left and may be cut.
    """

    heading: str
    cells: Sequence[str]
    rank: int = 0
    is_name: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether no row has a value."""
        return all(cell == EMPTY for cell in self.cells)

    @property
    def width(self) -> int:
        """The width of the longest cell."""
        from rich.cells import cell_len

        return max(map(cell_len, [self.heading, *self.cells]))


def fitted(columns: Sequence[TableColumn], width: int, *, title: str) -> Table:
    """A rich table of at most this width, if the columns of rank 0 have room in it.

    Columns without a value are left out, and then those of the highest rank. Names are cut last.
    """
    from rich import box
    from rich.table import Table

    shown = [column for column in columns if column.rank == 0 or not column.is_empty]
    while _width(shown) > width and max(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    excess = max(_width(shown) - width, 0)
    for column in shown:
        table.add_column(
            column.heading,
            justify="left" if column.is_name else "right",
            style="bold" if column.is_name else "",
            no_wrap=True,
            width=max(column.width - excess, 1) if column.is_name else column.width,
        )
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*cells)
    return table


def _width(columns: Sequence[TableColumn]) -> int:
    # Each cell has a space on both sides. There is one between columns and at both ends.
    return sum(column.width + 2 for column in columns) + len(columns) + 1

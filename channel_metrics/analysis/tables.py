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
        is_left: whether its cells stand on the left, but are never cut.
        max_width: a name is cut to this width.
    """

    heading: str
    cells: Sequence[str]
    rank: int = 0
    is_name: bool = False
    is_left: bool = False
    max_width: int = 1000

    @property
    def is_empty(self) -> bool:
        """Whether no row has a value."""
        return all(cell in (EMPTY, "") for cell in self.cells)

    @property
    def width(self) -> int:
        """The width of the longest cell."""
        from rich.cells import cell_len

        return min(self.max_width, max(map(cell_len, [self.heading, *self.cells])))


def fitted(
    columns: Sequence[TableColumn],
    width: int,
    *,
    title: str | None = None,
    caption: str | None = None,
    styles: Sequence[str] = (),
    has_total: bool = False,
) -> Table:
    """A rich table of at most this width, if the columns of rank 0 have room in it.

    Columns without a value are left out, and then those of the highest rank. Names are cut last.

    Args:
        columns: the columns, from left to right.
        width: that of the terminal.
        title: a line above.
        caption: a line below.
        styles: the style of each row.
        has_total: whether a line is drawn below the first row.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [column for column in columns if column.rank == 0 or not column.is_empty]
    while _width(shown) > width and max(column.rank for column in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    excess = max(_width(shown) - width, 0)
    for column in shown:
        table.add_column(
            column.heading,
            justify="left" if column.is_name or column.is_left else "right",
            style="bold" if column.is_name else "",
            no_wrap=True,
            width=max(column.width - excess, 1) if column.is_name else column.width,
        )
    for number, cells in enumerate(zip(*(column.cells for column in shown), strict=True)):
        style = styles[number] if styles else ""
        # Names are not interpreted as markup.
        texts = (Text(cell, style=style, overflow="ellipsis") for cell in cells)
        table.add_row(*texts, end_section=has_total and number == 0)
    return table


def _width(columns: Sequence[TableColumn]) -> int:
    # There are three spaces between columns, and one at both ends.
    return sum(column.width + 3 for column in columns) - 1

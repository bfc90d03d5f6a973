"""A table that reads well in a terminal, in a notebook and as plain text."""

from __future__ import annotations

import dataclasses
import html
from typing import Any

Cells = tuple[str, ...]

_CELL = "padding:2px 10px;white-space:nowrap;text-align:"
_OVER, _UNDER = (f";border-{side}:1px solid currentColor" for side in ("top", "bottom"))


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """A table of what remains of a network, a row for each layer.

    `print` shows it as plain text and a notebook as HTML; `rich.print` sets it in bold and lines,
    where rich is installed.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> net = dpai.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}, jnp.ones((1, 4)))
      >>> summary = dpai.topology(net, {"w": jnp.eye(4, 2, dtype=bool)}).summary()
      >>> summary.rows[0][0], len(summary.rows)
      ('w', 1)

    Attributes:
      title: what stands above it.
      headings: the names of the columns.
      rows: the cells, row by row.
      total: the last row.
      caption: what stands below it.
    """

    title: str
    headings: Cells
    rows: tuple[Cells, ...]
    total: Cells
    caption: str

    # Names and shapes start at the left, numbers end at the right.
    _LEFT = 2

    def __str__(self) -> str:
        table = [self.headings, *self.rows, self.total]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]

        def line(cells: Cells) -> str:
            parts = (
                f"{cell:<{width}}" if i < self._LEFT else f"{cell:>{width}}"
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join(parts).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [self.title, line(self.headings), rule, *map(line, self.rows), rule]
        return "\n".join([*lines, line(self.total), self.caption])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        def row(cells: Cells, tag: str, line: str = "") -> str:
            parts = (
                f'<{tag} style="{_CELL}{"left" if i < self._LEFT else "right"}{line}">'
                f"{html.escape(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(parts)}</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return (
            f"<p><strong>{html.escape(self.title)}</strong></p>"
            f'<table style="border-collapse:collapse"><thead>'
            f"{row(self.headings, 'th', _UNDER)}</thead><tbody>{body}</tbody>"
            f"<tfoot>{row(self.total, 'th', _OVER)}</tfoot></table>"
            f"<p>{html.escape(self.caption)}</p>"
        )

    def __rich__(self) -> Any:
        import rich.box  # only rich itself calls this
        import rich.table
        import rich.text

        table = rich.table.Table(
            title=rich.text.Text(self.title),
            title_style="bold",
            title_justify="left",
            caption=rich.text.Text(self.caption),
            caption_justify="left",
            box=rich.box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_footer=True,
        )
        for i, (heading, total) in enumerate(zip(self.headings, self.total, strict=True)):
            table.add_column(heading, total, justify="left" if i < self._LEFT else "right")
        for cells in self.rows:
            table.add_row(*map(rich.text.Text, cells))
        return table

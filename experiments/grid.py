"""Tables for terminals, documents and web pages."""

import dataclasses
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import rich.box
import rich.table

Cells = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        title: The text above it.
        headings: The columns' names.
        rows: The cells, row by row; None draws a line.
        left: The columns that are aligned to the left; the others are aligned to the right.
        caption: The text below it.
    """

    title: str
    headings: Cells
    rows: tuple[Cells | None, ...]
    left: Cells = ()
    caption: str | None = None

    @classmethod
    def of(
        cls,
        title: str,
        columns: Mapping[str, Callable[[Any], str]],
        items: Sequence[Any],
        **options: Any,
    ) -> Self:
        """Makes a table with a row for each item; the columns' functions make the cells."""
        rows = tuple(tuple(cell(item) for cell in columns.values()) for item in items)
        return cls(title, tuple(columns), rows, **options)

    def rich(self) -> rich.table.Table:
        """Returns the table for a terminal."""
        table = rich.table.Table(
            title=self.title,
            title_style="bold",
            title_justify="left",
            caption=self.caption,
            caption_justify="left",
            box=rich.box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for heading in self.headings:
            justify: Any = "left" if heading in self.left else "right"
            table.add_column(heading, justify=justify, no_wrap=True)
        for row in self.rows:
            if row is None:
                table.add_section()
            else:
                table.add_row(*row)
        return table

    def markdown(self) -> str:
        """Returns the table for a document."""
        ruler = ("---" if heading in self.left else "---:" for heading in self.headings)
        lines = [self.headings, tuple(ruler), *(row for row in self.rows if row is not None)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"*{self.title}*", text, self.caption) if part)

    def html(self) -> str:
        """Returns the table for a page; lines separate the table's bodies."""

        def row(cells: Cells, tag: str) -> str:
            texts = (
                f"<{tag}{' class=l' if heading in self.left else ''}>{html.escape(cell)}</{tag}>"
                for heading, cell in zip(self.headings, cells, strict=True)
            )
            return f"<tr>{''.join(texts)}</tr>"

        head = f"<thead>{row(self.headings, 'th')}</thead>"
        parts = itertools.groupby(self.rows, key=lambda cells: cells is None)
        bodies = (
            "\n".join(row(cells, "td") for cells in part if cells is not None)
            for line, part in parts
            if not line
        )
        return f"<table>{head}{''.join(f'<tbody>{body}</tbody>' for body in bodies)}</table>"

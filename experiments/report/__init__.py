"""Tables, figures and a web page of finished jobs."""

from experiments.report.figures import accuracy, draw, save
from experiments.report.records import panels
from experiments.report.tables import by_panel, sizes, table

__all__ = ["accuracy", "by_panel", "draw", "panels", "save", "sizes", "table"]

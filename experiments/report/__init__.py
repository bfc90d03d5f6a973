"""Tables, figures and a page of finished jobs."""

from experiments.report.figures import accuracy, draw, save
from experiments.report.records import panels
from experiments.report.tables import table

__all__ = ["accuracy", "draw", "panels", "save", "table"]

"""Tables, figures and a web page of finished jobs."""

from experiments.report.figures import accuracy, draw, save
from experiments.report.overview import distances, standing
from experiments.report.records import panels
from experiments.report.tables import accuracies, against, by_panel, sizes, table

__all__ = [
    "accuracies",
    "accuracy",
    "against",
    "by_panel",
    "distances",
    "draw",
    "panels",
    "save",
    "sizes",
    "standing",
    "table",
]

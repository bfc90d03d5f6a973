"""Data sets: `load` one by name, `feed` batches of its splits to devices."""

from experiments.datasets.feed import Feed, Resident, feed, samples
from experiments.datasets.loading import NAMES, default_data_dir, load, own_place
from experiments.datasets.types import Dataset, Split

__all__ = [
    "NAMES",
    "Dataset",
    "Feed",
    "Resident",
    "Split",
    "default_data_dir",
    "feed",
    "load",
    "own_place",
    "samples",
]

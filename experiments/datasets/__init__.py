"""Data sets in memory: `load` one by name, `batches` of a split for training."""

from experiments.datasets.batches import batches, samples
from experiments.datasets.loading import LOADERS, Dataset, Split, default_data_dir, load

__all__ = ["LOADERS", "Dataset", "Split", "batches", "default_data_dir", "load", "samples"]

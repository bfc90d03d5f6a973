"""Reads MNIST and Fashion-MNIST as they were published."""

import pathlib

from experiments.datasets import idx
from experiments.datasets.published import Archive, found
from experiments.datasets.types import Splits

MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
FASHION_MNIST = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"


def read_mnist(folder: pathlib.Path) -> Splits:
    """Reads 60,000 and 10,000 handwritten digits, grey, of 28×28 pixels."""
    return _read(folder, "mnist", MNIST)


def read_fashion_mnist(folder: pathlib.Path) -> Splits:
    """Reads 60,000 and 10,000 pieces of clothing, grey, of 28×28 pixels."""
    return _read(folder, "fashion_mnist", FASHION_MNIST)


def _read(folder: pathlib.Path, dataset: str, address: str) -> Splits:
    for name in (name for names in idx.FILES.values() for name in names):
        packed = Archive(f"{name}.gz", f"{address}{name}.gz")
        manual = found(folder, dataset, [packed, Archive(name, packed.address)]).parent
    return idx.read(manual)

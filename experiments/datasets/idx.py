"""Reads the files of the MNIST family."""

import gzip
import math
import pathlib
import struct
import zlib

import numpy as np

from experiments.config import ConfigError
from experiments.datasets.checks import checked
from experiments.datasets.types import Splits

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Names of the files of images and labels, without ".gz", which may follow."""


def read(folder: pathlib.Path) -> Splits:
    """Reads the four files of a folder, gzipped or not.

    Raises:
        ConfigError: One is missing or damaged.
    """
    parts = {name: [_array(folder, file) for file in files] for name, files in FILES.items()}
    return {name: checked(str(folder), name, *arrays) for name, arrays in parts.items()}


def _array(folder: pathlib.Path, name: str) -> np.ndarray:
    """Returns the array of an idx file: two zero bytes, its type, its rank, its sizes, its values.

    References:
        LeCun, Cortes and Burges, The MNIST database, "The IDX file format".
    """
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise ConfigError(f"{folder} must hold a file {name} or {name}.gz.")
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        zero, kind, rank = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{rank}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise ConfigError(f"{path} can't be read as an idx file: {error}.") from error
    if (zero, kind) != (0, 8) or len(content) != 4 + 4 * rank + math.prod(shape):
        raise ConfigError(f"{path} can't be read as an idx file of bytes, or is incomplete.")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)

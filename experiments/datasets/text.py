"""Reads any file as a sequence of bytes, for a decoder to predict."""

import pathlib

import numpy as np

from experiments.config import ConfigError
from experiments.datasets.types import Split, Splits

CLASSES = 256
"""A token is a byte."""

LENGTH = 128
"""Tokens in a sequence."""


def read(path: pathlib.Path) -> Splits:
    """Cuts a file into sequences; each byte's label is the next byte.

    The first eight tenths are for training, the next one for validation, the last one for the test,
    so that no part contains pieces of another one's sentences.

    Raises:
        ConfigError: There is no such file, or it is too short.
    """
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}.") from error
    count = (len(content) - 1) // LENGTH
    if count < 10:
        raise ConfigError(f"{path} must have at least {10 * LENGTH + 1} bytes; got {len(content)}.")
    tokens = content[: count * LENGTH].reshape(count, LENGTH)
    following = content[1 : count * LENGTH + 1].reshape(count, LENGTH).astype(np.int32)
    held = count // 10
    edges = {
        "train": slice(0, count - 2 * held),
        "validation": slice(count - 2 * held, count - held),
        "test": slice(count - held, count),
    }
    return {name: Split(tokens[rows], following[rows]) for name, rows in edges.items()}

"""Reads a user's arrays from a NumPy file."""

import itertools
import pathlib
import zipfile

import numpy as np

from experiments.config import ConfigError
from experiments.datasets.checks import checked
from experiments.datasets.photos import decoded_all
from experiments.datasets.types import Split, Splits


def read(path: pathlib.Path) -> Splits:
    """Reads `train_images`, `train_labels`, `test_images` and `test_labels`.

    A part may hold encoded images of one size instead: `train_jpeg`, the bytes of all images one
    after another; `train_offset`, where each begins and the last one ends; and `train_label`.

    Raises:
        ConfigError: The file or its arrays are not what they must be.
    """
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}.") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} can't be read as a file of np.savez: {error}.") from error
    return {name: _part(path, name, arrays) for name in ("train", "test")}


def _part(path: pathlib.Path, name: str, arrays: dict[str, np.ndarray]) -> Split:
    encoded = f"{name}_jpeg" in arrays
    fields = ("jpeg", "offset", "label") if encoded else ("images", "labels")
    for field in fields:
        if f"{name}_{field}" not in arrays:
            raise ConfigError(f"{path} must hold an array {name}_{field}; got {sorted(arrays)}.")
    content, *offset, labels = (arrays[f"{name}_{field}"] for field in fields)
    images = _images(path, name, content, offset[0]) if encoded else content
    return checked(str(path), name, images, labels)


def _images(path: pathlib.Path, name: str, jpeg: np.ndarray, offset: np.ndarray) -> np.ndarray:
    whole = jpeg.dtype == np.uint8 and jpeg.ndim == 1
    if not whole or offset.ndim != 1 or not np.issubdtype(offset.dtype, np.integer):
        raise ConfigError(
            f"{path}: {name}_jpeg must be uint8 and {name}_offset integers, each with one axis; "
            f"got {jpeg.dtype} of shape {jpeg.shape} and {offset.dtype} of shape {offset.shape}."
        )
    edges = offset.tolist()
    if len(edges) < 2 or edges[0] < 0 or edges[-1] > len(jpeg) or np.any(np.diff(offset) <= 0):
        raise ConfigError(
            f"{path}: {name}_offset must rise from image to image within the {len(jpeg)} bytes of "
            f"{name}_jpeg."
        )
    content = jpeg.tobytes()
    try:
        return decoded_all(content[begin:end] for begin, end in itertools.pairwise(edges))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: {name}_jpeg must hold images of one size that Pillow reads: {error}."
        ) from error

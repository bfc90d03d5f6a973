"""Checks arrays before they become a data set."""

import numpy as np

from experiments.config import ConfigError
from experiments.datasets.types import Split


def checked(where: str, name: str, images: np.ndarray, labels: np.ndarray) -> Split:
    """Checks arrays from a user's file, and returns them as a split.

    Args:
        where: What they were read from, for messages.
        name: "train" or "test".
        images: Of shape (count, height, width) or (count, height, width, channels), uint8 or
            floating.
        labels: Integers of shape (count,), counted from 0.

    Raises:
        ConfigError: They are anything else.
    """
    pictures, answers = f"{where}: {name} images", f"{where}: {name} labels"
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ConfigError(
            f"{pictures} must have the shape (count, height, width) or "
            f"(count, height, width, channels); got {images.shape}."
        )
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ConfigError(f"{pictures} must be uint8 or floating; got {images.dtype}.")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(
            f"{answers} must be integers of shape (count,); got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if len(images) != len(labels):
        raise ConfigError(
            f"{where}: there must be one label for each of the {len(images)} {name} images; "
            f"got {len(labels)}."
        )
    if labels.min() < 0:
        raise ConfigError(f"{answers} must not be negative; got {labels.min()}.")
    if name == "train" and labels.max() >= len(labels):
        raise ConfigError(
            f"{answers} must be counted from 0, each class with an image; got {labels.max()} "
            f"among {len(labels)} labels."
        )
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
        if not np.all(np.isfinite(images)):
            raise ConfigError(f"{pictures} must be finite; got NaN or infinity.")
    images = images[..., None] if images.ndim == 3 else images
    return Split(images, labels.astype(np.int32))

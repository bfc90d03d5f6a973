"""The types that data sets are read into."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.datasets.photos import Photos


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A part of a data set, as it is stored.

    Attributes:
        images: uint8 or float32 of shape (count, height, width, channels), in memory or on disk;
            of a text uint8 tokens of shape (count, length).
        labels: int32 of shape (count,); of a text (count, length).
    """

    images: np.ndarray | Photos
    labels: np.ndarray

    def select(self, rows: np.ndarray) -> "Split":
        """Returns the split of some rows. Images on disk stay there."""
        images = self.images
        chosen = images.select(rows) if isinstance(images, Photos) else images[rows]
        return Split(chosen, self.labels[rows])


Batch = tuple[jax.Array, jax.Array]
"""A network's input and its labels, both split over a mesh along their first axis."""

Splits = Mapping[str, Split]
"""What a reader returns: "train" and "test", and "validation" if it was split off."""


@dataclasses.dataclass(frozen=True, eq=False)
class Normalization:
    """Shifts and scales each channel. A pytree.

    Attributes:
        mean: float32 of shape (channels,).
        deviation: float32 of shape (channels,).
    """

    mean: Any
    deviation: Any

    def __call__(self, images: jax.Array) -> jax.Array:
        """Returns float32 images (count, height, width, channels), normalized."""
        centered = images.astype(jnp.float32) - self.mean[None, None, None]
        return centered / self.deviation[None, None, None]


jax.tree_util.register_dataclass(Normalization)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, with what a network needs to know about it.

    Attributes:
        name: Its name in configurations.
        train: The split to train on.
        validation: The split that the best epoch is chosen by.
        test: The split to report results on.
        num_classes: Number of labels.
        augmentation: What suits its training images, one of `config.AUGMENTATIONS`.
        normalization: By the mean and deviation of each channel over the training split; None for
            tokens.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    augmentation: str
    normalization: Normalization | None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image, (length,) of a text."""
        return self.train.images.shape[1:]

    @property
    def dtype(self) -> Any:
        """The dtype of a network's input: float32, or int32 for tokens."""
        return jnp.int32 if self.normalization is None else jnp.float32

    def normalized(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Returns images, or tokens, as a network's input."""
        return network_input(images, self.normalization)


@jax.jit
def network_input(images: Any, normalization: Normalization | None) -> jax.Array:
    """Returns normalized float32 images, or int32 tokens if there is no normalization."""
    return images.astype(jnp.int32) if normalization is None else normalization(images)

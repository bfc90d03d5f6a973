"""Batches on devices, from a split in memory or on disk."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import Partial

from experiments import cpu, devices
from experiments.datasets import augment
from experiments.datasets.augment import Augmentation
from experiments.datasets.photos import Photos
from experiments.datasets.stream import Stream
from experiments.datasets.types import Batch, Dataset, Normalization, Split, network_input


class Feed(Protocol):
    """Gives the batches of a split, all of one shape."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yields the shuffled, augmented batches of an epoch, the same at every call.

        An incomplete batch at the end of the epoch is dropped.
        """

    def once(self) -> Iterator[Batch]:
        """Yields the split in its own order; the last batch is filled up with labels of -1."""


def feed(
    data: Dataset,
    split: Split,
    batch_size: int,
    *,
    mesh: Mesh | None = None,
    augmentation: str | None = "none",
    seed: int = 0,
) -> Feed:
    """Returns the batches of a split. Arrays are kept on the devices, photos are streamed.

    Args:
        data: The data set of the split.
        split: Images and labels.
        batch_size: Images in a batch.
        mesh: The devices that share a batch; by default all devices.
        augmentation: How to augment the images of an epoch; None for what suits the data set.
        seed: Seed of the order and the augmentation. Both depend only on the seed and the epoch,
            on any number of devices and processes.

    Raises:
        ConfigError: There is no such augmentation for these images.
    """
    mesh = devices.data_mesh() if mesh is None else mesh
    name = data.augmentation if augmentation is None else augmentation
    transform = augment.named(name, data.image_shape)
    make = Stream if isinstance(split.images, Photos) else Resident
    return make(split, batch_size, mesh, transform, data.normalization, seed)


class Resident:
    """The feed of a split in memory, which is replicated on each device of a mesh.

    For each batch the host only sends the rows and a few random numbers for each image.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mesh: Mesh,
        augmentation: Augmentation,
        normalization: Normalization | None,
        seed: int,
    ) -> None:
        whole = np.asarray(split.images), split.labels
        self._images, self._labels = devices.on_each(mesh, whole)
        self._batch_size, self._mesh, self._seed = batch_size, mesh, seed
        self._augmentation, self._normalization = augmentation, normalization
        self._sharding = NamedSharding(mesh, PartitionSpec(devices.DATA))

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yields the shuffled, augmented batches of an epoch."""
        for rows, draws in self._drawn(number):
            yield self._batch(rows, draws, self._augmentation)

    def epoch_inside(self, number: int) -> tuple[Partial, Any]:
        """Returns the batches of an epoch for a program that takes all of its steps.

        Returns:
            A function that returns the batch of a step, to call inside the program; and its
            arguments for all steps, arrays whose first axis is over the steps.
        """
        each = jax.tree.map(lambda *steps: np.stack(steps), *self._drawn(number))
        batch_of = _batch_of(self._augmentation, self._sharding)
        inside = Partial(batch_of, self._images, self._labels, self._normalization)
        return inside, devices.split(self._mesh, *each, axis=1)

    def _drawn(self, number: int) -> Iterator[tuple[np.ndarray, augment.Draws]]:
        """Yields the rows of each batch of an epoch, and the numbers that augment them."""
        rng = np.random.default_rng((self._seed, number))
        order = rng.permutation(len(self._labels)).astype(np.int32)
        for start in range(0, len(order) - self._batch_size + 1, self._batch_size):
            draws = self._augmentation.draw(rng, self._batch_size, self._images.shape[1:])
            yield order[start : start + self._batch_size], draws

    def once(self) -> Iterator[Batch]:
        """Yields the split in its own order; the last batch is filled up."""
        rows = np.arange(len(self._labels), dtype=np.int32)
        filled = np.pad(rows, (0, -len(rows) % self._batch_size), constant_values=-1)
        for batch in filled.reshape(-1, self._batch_size):
            yield self._batch(batch, {}, Augmentation())

    def _batch(self, rows: np.ndarray, draws: augment.Draws, augmentation: Augmentation) -> Batch:
        batch_of = _batch_of(augmentation, self._sharding)
        drawn = devices.split(self._mesh, rows, draws)
        return cpu.settled(batch_of(self._images, self._labels, self._normalization, drawn))


# Cached, so that feeds get the same function, and share what is compiled for it.
@functools.lru_cache
def _batch_of(augmentation: Augmentation, sharding: NamedSharding) -> Callable[..., Batch]:
    """Returns a function from rows, and the numbers drawn for them, to a batch."""

    @jax.jit
    def batch_of(
        images: jax.Array,
        labels: jax.Array,
        normalization: Normalization | None,
        drawn: list[Any],
    ) -> Batch:
        """Returns the batch; rows of -1 get labels of -1."""
        rows, draws = drawn
        chosen, labels = images[jnp.maximum(rows, 0)], labels[jnp.maximum(rows, 0)]
        missing = (rows < 0).reshape(rows.shape + (1,) * (labels.ndim - 1))
        batch = network_input(augmentation(chosen, draws), normalization)
        labels = jnp.where(missing, -1, labels)
        shared: Any = jax.lax.with_sharding_constraint((batch, labels), sharding)
        return shared

    return batch_of


def samples(data: Dataset, number: int, *, seed: int, per_class: int = 10) -> list[Batch]:
    """Returns batches with the same number of images of each class, for methods that need data.

    No image is in two batches, unless a class has too few. A text has no classes, so its batches
    are 64 sequences each.

    Args:
        data: The data set; batches are drawn from its training split.
        number: How many batches.
        seed: Seed of the draw.
        per_class: Images of each class in a batch.
    """
    rng = np.random.default_rng(seed)
    split = data.train
    if split.labels.ndim > 1:
        chosen = np.resize(rng.permutation(len(split.labels)), (number, 64))
    else:
        members = (np.flatnonzero(split.labels == label) for label in range(data.num_classes))
        wanted = number * per_class
        columns = [np.resize(rng.permutation(rows), wanted) for rows in members]
        chosen = np.stack(columns, axis=1).reshape(number, per_class * data.num_classes)
    return [
        (data.normalized(split.images[rows]), jnp.asarray(split.labels[rows])) for rows in chosen
    ]

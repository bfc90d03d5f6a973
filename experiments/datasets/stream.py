"""Batches of photos on disk, which workers read, decode and resize; never all in memory."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import cpu, devices
from experiments.datasets import augment
from experiments.datasets.augment import Augmentation
from experiments.datasets.photos import Photos, central_box, resized
from experiments.datasets.types import Batch, Normalization, Split, network_input


class Stream:
    """The feed of a split of photos.

    Each process reads its own part of each batch. Random boxes are cut on the host, where photos
    still have different sizes. Everything else is done on the devices.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        mesh: Mesh,
        augmentation: Augmentation,
        normalization: Normalization | None,
        seed: int,
        workers: int | None = None,
    ) -> None:
        self._split, self._batch_size, self._mesh, self._seed = split, batch_size, mesh, seed
        self._boxes = augmentation.resize
        self._augmentation = dataclasses.replace(augmentation, resize=False)
        self._normalization = normalization
        self._workers = cpu.cores() if workers is None else workers

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yields the shuffled, augmented batches of an epoch."""
        rng = np.random.default_rng((self._seed, number))
        order = rng.permutation(len(self._split.labels))
        rows = order[: len(order) // self._batch_size * self._batch_size]
        seed = (self._seed, number) if self._boxes else None
        for images, labels in self._read(rows, seed):
            draws = self._augmentation.draw(rng, self._batch_size, self._split.images.shape[1:])
            yield self._finished(images, labels, draws, self._augmentation)

    def once(self) -> Iterator[Batch]:
        """Yields the split in its own order; the last batch is filled up."""
        rows = np.arange(len(self._split.labels))
        missing = -len(rows) % self._batch_size
        for images, labels in self._read(np.pad(rows, (0, missing), constant_values=-1), None):
            yield self._finished(images, labels, {}, Augmentation())

    def _read(self, rows: np.ndarray, seed: tuple[int, int] | None) -> Iterator[Any]:
        """Yields this process's part of each batch of rows, as NumPy arrays."""
        # The import takes a second, and is only needed for photos.
        import grain
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's flags keep their defaults
        part = self._batch_size // jax.process_count()
        everyones = np.arange(len(rows)).reshape(-1, jax.process_count(), part)
        places = everyones[:, jax.process_index()].ravel()
        examples = Examples(self._split, rows[places], places, seed)
        batches = grain.MapDataset.source(examples).batch(part).to_iter_dataset()
        if self._workers > 1:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers))
        return iter(batches)

    def _finished(
        self, images: np.ndarray, labels: np.ndarray, draws: augment.Draws, transform: Augmentation
    ) -> Batch:
        sharding = NamedSharding(self._mesh, PartitionSpec(devices.DATA))
        x, y = (jax.make_array_from_process_local_data(sharding, a) for a in (images, labels))
        (drawn,) = devices.split(self._mesh, draws)
        batch = _input(x, drawn, self._normalization, augmentation=transform), y
        return cpu.settled(batch)


@functools.partial(jax.jit, static_argnames="augmentation")
def _input(
    images: jax.Array,
    draws: dict[str, jax.Array],
    normalization: Normalization | None,
    *,
    augmentation: Augmentation,
) -> jax.Array:
    return network_input(augmentation(images, draws), normalization)


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """What workers read: uint8 images of one size, and their labels.

    Attributes:
        split: Photos and labels.
        rows: Which of them; -1 is a black image with the label -1.
        places: The position of each row in the epoch, part of the seed of its box.
        seed: Seed of the boxes, or None for the middle of each photo.
    """

    split: Split
    rows: np.ndarray
    places: np.ndarray
    seed: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        photos, row = self.split.images, int(self.rows[index])
        assert isinstance(photos, Photos)
        if row < 0:
            return np.zeros(photos.shape[1:], np.uint8), -1
        image = photos.image(row)
        box = central_box(image)
        if self.seed is not None:
            rng = np.random.default_rng((*self.seed, int(self.places[index])))
            ((top, left, tall, wide),) = augment.random_boxes(rng, 1, image.height, image.width)
            box = (left, top, left + wide, top + tall)
        return resized(image, box, photos.size), int(self.split.labels[row])

"""Training batches as plain numpy arrays."""

from collections.abc import Iterator

import numpy as np

from experiments.datasets.loading import Split


def batches(
    split: Split, batch_size: int, *, seed: int, epoch: int, shift: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields one epoch of shuffled, augmented batches, a function of (seed, epoch) alone.

    Args:
        split: Images and labels to draw from.
        batch_size: Images a batch. What is left over at the end of the epoch is dropped, so all
            batches have one shape.
        seed: Seed of the order and the augmentation.
        epoch: Number of the epoch; each has an order of its own.
        shift: Each image moves by up to so many pixels along each axis, zeros moving in.

    Yields:
        Images of shape (batch_size, height, width, channels) and labels of shape (batch_size,).
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(split.labels))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        index = order[start : start + batch_size]
        yield _shifted(split.images[index], shift, rng), split.labels[index]


def _shifted(images: np.ndarray, shift: int, rng: np.random.Generator) -> np.ndarray:
    """Crops each image at a random offset from its zero-padded self."""
    if shift == 0:
        return images
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    row, column = rng.integers(0, 2 * shift + 1, size=(2, count))
    return np.moveaxis(windows[np.arange(count), row, column], 1, -1)


def samples(
    split: Split, num_classes: int, number: int, *, seed: int, per_class: int = 10
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns batches that hold as many images of each class, for methods that prune by data.

    No image is in two batches, unless a class has too few.

    Args:
        split: Images and labels to draw from.
        num_classes: Number of labels.
        number: How many batches.
        seed: Seed of the draw.
        per_class: Images of each class in a batch.
    """
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(split.labels == c)) for c in range(num_classes)]
    wanted = number * per_class
    columns = np.stack([np.resize(index, wanted) for index in classes], axis=1)
    chosen = [columns[i : i + per_class].ravel() for i in range(0, wanted, per_class)]
    return [(split.images[index], split.labels[index]) for index in chosen]

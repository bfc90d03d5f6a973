"""Parts of a split with the same proportions of all classes."""

import numpy as np

from experiments.config import ConfigError
from experiments.datasets.types import Split


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """Returns a shuffled order of the examples, with all classes evenly spread.

    An example's place is its random rank within its class, as a fraction of the class.
    """
    # RandomState draws the same numbers in all versions of NumPy, so the splits never change.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    place = np.empty(len(labels))
    place[by_class] = (np.arange(len(labels)) - starts + 0.5) / np.repeat(counts, counts)
    return np.lexsort((labels, place))


def held_out(split: Split) -> tuple[Split, Split]:
    """Splits off a tenth of the images, always the same; returns the rest and the tenth."""
    order = stratified_order(split.labels)
    tenth = max(1, len(order) // 10)
    return split.select(np.sort(order[tenth:])), split.select(np.sort(order[:tenth]))


def limited(split: Split, train_images: int) -> Split:
    """Returns a split of this many images, always the same.

    Raises:
        ConfigError: There are fewer.
    """
    if not 1 <= train_images <= len(split.labels):
        raise ConfigError(
            f"train_images must lie between 1 and the {len(split.labels)} training images; "
            f"got {train_images}."
        )
    labels = split.labels
    # A text has no classes.
    order = stratified_order(labels) if labels.ndim == 1 else np.arange(len(labels))
    return split.select(np.sort(order[:train_images]))

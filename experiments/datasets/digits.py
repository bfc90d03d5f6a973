"""TFDS builder of the handwritten digits that come with scikit-learn."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

VALIDATION_SIZE = 180
TEST_SIZE = 360


class Digits(tfds.core.GeneratorBasedBuilder):
    """1797 grey images of 8x8 pixels with values 0 to 16, in ten classes. Needs no network."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="The 8x8 handwritten digits of sklearn.datasets.load_digits.",
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # Nothing is downloaded.
        # scikit-learn takes two seconds to import and is needed only once a machine.
        import sklearn.datasets

        bunch = sklearn.datasets.load_digits()
        images = bunch.images.astype(np.uint8)[..., None]
        labels = bunch.target
        order = stratified_order(labels)
        held_out = TEST_SIZE + VALIDATION_SIZE
        rows = {
            "train": order[held_out:],
            "validation": order[TEST_SIZE:held_out],
            "test": order[:TEST_SIZE],
        }
        return {
            name: self._generate_examples(images, labels, index) for name, index in rows.items()
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, rows: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields pairs of a row in scikit-learn's arrays and its example."""
        for row in rows:
            yield int(row), {"image": images[row], "label": int(labels[row])}


def stratified_order(labels: np.ndarray) -> np.ndarray:
    """Returns a shuffled order of the examples of which every stretch holds all classes alike.

    Each example's place is its random rank within its class, as a fraction of the class.
    """
    # RandomState's stream is frozen across numpy's versions, so the splits never change.
    shuffled = np.random.RandomState(0).permutation(len(labels))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return np.lexsort((labels, place))

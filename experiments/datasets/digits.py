"""TFDS builder of the handwritten digits that come with scikit-learn."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.datasets.prepared import prepared
from experiments.datasets.splitting import stratified_order
from experiments.datasets.types import Split, Splits

VALIDATION_SIZE = 180
TEST_SIZE = 360


def read(folder: pathlib.Path) -> Splits:
    """Reads the prepared digits of a folder, all three splits."""
    builder = prepared(Digits, folder)
    splits = {}
    for name in ("train", "validation", "test"):
        source = builder.as_data_source(split=name)
        examples = source.__getitems__(range(len(source)))
        images = np.stack([example["image"] for example in examples])
        labels = np.asarray([example["label"] for example in examples], np.int32)
        splits[name] = Split(images, labels)
    return splits


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
        # scikit-learn takes two seconds to import, and is needed only once on a machine.
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

"""Reads ImageNet-1K (ILSVRC 2012) from its published archives."""

import io
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np

from experiments.datasets.jpegs import Examples, Jpegs, read_again
from experiments.datasets.photos import Photos
from experiments.datasets.published import Archive
from experiments.datasets.types import Normalization, Split, Splits

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
PAGE = "https://image-net.org/challenges/LSVRC/2012/2012-downloads"
ARCHIVES = [[Archive(name, PAGE)] for name in (TRAIN, VALIDATION, DEVKIT)]

HELD_OUT = 10
"""How many training images of each class become the validation split."""

NORMALIZATION = Normalization(
    np.float32(255) * np.array([0.485, 0.456, 0.406], np.float32),
    np.float32(255) * np.array([0.229, 0.224, 0.225], np.float32),
)
"""The commonly used mean and deviation of ImageNet's channels."""


class Imagenet(Jpegs):
    """1,281,167 and 50,000 photos in 1000 classes.

    The labels of the published test photos are secret. So the published validation part is the test
    split, and the last photos of each class's archive are the validation split.
    """

    def splits(self, manual: pathlib.Path) -> dict[str, Examples]:
        """Reads the three archives, photo by photo."""
        names, truth = _devkit(manual / DEVKIT)
        label_of = {name: label for label, name in enumerate(sorted(names.values()))}
        return {
            "train": _photos(manual / TRAIN, label_of, slice(None, -HELD_OUT)),
            "validation": _photos(manual / TRAIN, label_of, slice(-HELD_OUT, None)),
            "test": _test(manual / VALIDATION, [label_of[names[number]] for number in truth]),
        }


def _devkit(path: pathlib.Path) -> tuple[dict[int, str], list[int]]:
    """Returns the WordNet name of each class by its number, and the numbers of the test photos."""
    import scipy.io

    with tarfile.open(path) as archive:
        files = {pathlib.PurePath(member.name).name: member for member in archive}
        meta, truth = (
            archive.extractfile(files[name]).read()  # type: ignore[union-attr]
            for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
        )
    synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    # Synsets with children are not classes, but groups of classes.
    names = {
        int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if not row["num_children"]
    }
    return names, [int(number) for number in truth.split()]


def _photos(
    path: pathlib.Path, label_of: dict[str, int], part: slice
) -> Iterator[tuple[bytes, int]]:
    """Yields a part of the photos of each class, which has an archive inside the archive."""
    with tarfile.open(path) as archive:
        for member in sorted(archive, key=lambda member: member.name):
            label = label_of[member.name.removesuffix(".tar")]
            with tarfile.open(fileobj=archive.extractfile(member)) as photos:
                for photo in sorted(photos, key=lambda photo: photo.name)[part]:
                    yield photos.extractfile(photo).read(), label  # type: ignore[union-attr]


def _test(path: pathlib.Path, labels: list[int]) -> Iterator[tuple[bytes, int]]:
    """Yields the test photos in the order of their numbers, which is that of their labels."""
    with tarfile.open(path) as archive:
        photos = sorted(archive, key=lambda photo: photo.name)
        for photo, label in zip(photos, labels, strict=True):
            yield archive.extractfile(photo).read(), label  # type: ignore[union-attr]


def read(folder: pathlib.Path) -> Splits:
    """Opens all three splits, which stay on disk."""
    parts = read_again(Imagenet, folder, ARCHIVES)
    return {
        name: Split(Photos(blobs, np.arange(len(labels))), labels)
        for name, (blobs, labels) in parts.items()
    }

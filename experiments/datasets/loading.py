"""Data sets by name."""

import functools
import os
import pathlib
from collections.abc import Callable

import numpy as np

from dpai_jax.caching import user_folder
from experiments.config import ConfigError
from experiments.datasets import cifar, digits, idx, imagenet, mnist, npz, text, tiny_imagenet
from experiments.datasets.photos import Photos
from experiments.datasets.splitting import held_out, limited
from experiments.datasets.types import Dataset, Normalization, Split, Splits

NAMES: dict[str, tuple[Callable[[pathlib.Path], Splits], str]] = {
    "digits": (digits.read, "shift"),
    "mnist": (mnist.read_mnist, "none"),
    "fashion_mnist": (mnist.read_fashion_mnist, "none"),
    "cifar10": (cifar.read_cifar10, "crop-flip"),
    "cifar100": (cifar.read_cifar100, "crop-flip"),
    "tiny_imagenet": (tiny_imagenet.read, "crop-flip"),
    "imagenet": (imagenet.read, "resized-crop-flip"),
}
"""Readers of the published data sets in a folder, with the augmentation that suits each."""

FILES: dict[str, Callable[[pathlib.Path], Splits]] = {
    "npz": npz.read,
    "idx": idx.read,
    "text": text.read,
}
"""Readers of a user's own file or folder, which is named after a colon."""


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    train_images: int | None = None,
) -> Dataset:
    """Loads a data set; prepares it on disk the first time.

    If no validation split was published, it is a tenth of the training images, always the same.
    Any number of processes may call this at once.

    Args:
        name: One of `NAMES`; or "npz:FILE", "idx:FOLDER" or "text:FILE".
        data_dir: Folder of data sets; by default `default_data_dir()`.
        train_images: Keep this many images of the training split, evenly from all classes.

    Raises:
        ConfigError: No data set has this name, or it can't be read.
    """
    folder = default_data_dir() if data_dir is None else pathlib.Path(data_dir)
    own = own_place(name)
    changed = own.stat().st_mtime_ns if own is not None and own.exists() else None
    return _loaded(name, folder, train_images, changed)


def own_place(name: str) -> pathlib.Path | None:
    """Returns the file or folder of a user's own data set; None for a published one."""
    kind, colon, path = name.partition(":")
    return pathlib.Path(path).expanduser() if colon and kind in FILES else None


# Cached, so that the jobs of a sweep read it once.
@functools.lru_cache(maxsize=1)
def _loaded(
    name: str, folder: pathlib.Path, train_images: int | None, changed: int | None
) -> Dataset:
    """Reads a data set; its arrays are never changed."""
    del changed  # the time when a user's own file was written: only a key of the cache
    own, kind = own_place(name), name.partition(":")[0]
    if own is not None:
        augmentation = "none"
        splits = dict(FILES[kind](own))
    elif name in NAMES:
        reader, augmentation = NAMES[name]
        splits = dict(reader(folder))
    else:
        raise ConfigError(
            f"dataset must be one of {sorted(NAMES)}, npz:FILE, idx:FOLDER or text:FILE; "
            f"got {name!r}."
        )
    if "validation" not in splits:
        splits["train"], splits["validation"] = held_out(splits["train"])
    tokens = kind == "text"
    number = text.CLASSES if tokens else 1 + int(splits["train"].labels.max())
    if train_images is not None:
        splits["train"] = limited(splits["train"], train_images)
    if not tokens:
        _check(name, splits, number)
    return Dataset(
        name=name,
        num_classes=number,
        augmentation=augmentation,
        normalization=None if tokens else _normalization(splits["train"]),
        **splits,
    )


def default_data_dir() -> pathlib.Path:
    """Returns $TFDS_DATA_DIR, or `dpai_jax` in the user's cache folder."""
    if configured := os.environ.get("TFDS_DATA_DIR"):
        return pathlib.Path(configured).expanduser()
    return user_folder()


def _check(name: str, splits: Splits, classes: int) -> None:
    """Checks that the splits fit together, and that every class can be learned."""
    shapes = {split.images.shape[1:] for split in splits.values()}
    if len(shapes) > 1:
        raise ConfigError(f"{name}: all images must have one shape; got {sorted(shapes)}.")
    missing = np.flatnonzero(np.bincount(splits["train"].labels, minlength=classes) == 0)
    if len(missing):
        raise ConfigError(
            f"{name}: each of the {classes} classes must occur in the training split; "
            f"class {missing[0]} does not."
        )
    largest = max(int(split.labels.max()) for split in splits.values())
    if largest >= classes:
        raise ConfigError(
            f"{name}: the test labels must be among the {classes} training labels; got {largest}."
        )


def _normalization(train: Split) -> Normalization:
    """Returns the mean and deviation of each channel; for photos, those of ImageNet."""
    images = train.images
    if isinstance(images, Photos):
        return imagenet.NORMALIZATION
    # In parts, as float64 would need eight times the memory.
    parts = np.array_split(images, -(-len(images) // 1000))
    pixels = images[..., 0].size
    totals = np.stack([part.sum((0, 1, 2), dtype=np.float64) for part in parts])
    mean = totals.sum(0) / pixels
    squares = np.stack([np.square(part - mean).sum((0, 1, 2)) for part in parts])
    variance = squares.sum(0) / pixels
    # A constant channel is divided by one, not by zero.
    deviation = np.where(variance > 0, np.sqrt(variance), 1.0)
    return Normalization(mean.astype(np.float32), deviation.astype(np.float32))

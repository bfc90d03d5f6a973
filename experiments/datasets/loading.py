"""Reads prepared TFDS builders into memory, without TensorFlow."""

import contextlib
import dataclasses
import io
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from dpai_jax.caching import user_folder
from experiments.config import ConfigError
from experiments.datasets.digits import Digits


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """A part of a data set.

    Attributes:
        images: float32 of shape (count, height, width, channels).
        labels: int32 of shape (count,).
    """

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, each channel with mean 0 and variance 1 over the training split.

    Attributes:
        name: Its name in the registry.
        train: What the weights are fitted to.
        validation: What the best epoch is chosen by.
        test: What results are reported on.
        num_classes: Number of labels.
        shift: Pixels by which an image may move without changing its meaning.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    shift: int

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(height, width, channels) of an image."""
        return self.train.images.shape[1:]


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set, preparing it on disk the first time.

    Any number of processes may call this at once.

    Args:
        name: Name of the data set, one of `LOADERS`.
        data_dir: Folder of prepared data sets; by default `default_data_dir()`.

    Returns:
        The data set, normalized.

    Raises:
        ConfigError: No data set has this name.
    """
    if name not in LOADERS:
        raise ConfigError(f"dataset must be one of {sorted(LOADERS)}; got {name!r}.")
    folder = default_data_dir() if data_dir is None else pathlib.Path(data_dir)
    return LOADERS[name](folder)


def default_data_dir() -> pathlib.Path:
    """Returns $TFDS_DATA_DIR, or `dpai_jax` in the user's cache folder."""
    if configured := os.environ.get("TFDS_DATA_DIR"):
        return pathlib.Path(configured).expanduser()
    return user_folder()


def _load_digits(folder: pathlib.Path) -> Dataset:
    builder = _prepared(Digits, folder)
    splits = {name: _read(builder, name) for name in ("train", "validation", "test")}
    return Dataset(name="digits", num_classes=10, shift=1, **_normalized(splits))


LOADERS: dict[str, Callable[[pathlib.Path], Dataset]] = {"digits": _load_digits}


def _prepared(
    builder_class: type[tfds.core.GeneratorBasedBuilder], folder: pathlib.Path
) -> tfds.core.DatasetBuilder:
    """Returns a builder whose files are on disk."""
    target = folder / builder_class.name / str(builder_class.VERSION)
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        # Written beside its place and moved there in one step, so that of several processes one
        # wins and none sees half a data set.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            with _silenced(), _temporary_files_in(scratch):
                draft = builder_class(data_dir=scratch, file_format="array_record")
                draft.download_and_prepare()
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                pathlib.Path(draft.data_dir).rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    return builder_class(data_dir=folder, file_format="array_record")


@contextlib.contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Gathers temporary files in a folder: TFDS leaves one behind for each data set it prepares."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keeps TFDS's prints and progress bars off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _read(builder: tfds.core.DatasetBuilder, split: str) -> Split:
    """Reads a whole split into memory."""
    source = builder.as_data_source(split=split)
    examples = source.__getitems__(range(len(source)))
    images = np.stack([example["image"] for example in examples]).astype(np.float32)
    labels = np.asarray([example["label"] for example in examples], np.int32)
    return Split(images, labels)


def _normalized(splits: dict[str, Split]) -> dict[str, Split]:
    """Shifts and scales each channel by the training split's mean and deviation."""
    train = splits["train"].images.astype(np.float64)
    mean, deviation = train.mean((0, 1, 2)), train.std((0, 1, 2))

    def normalize(split: Split) -> Split:
        return Split(((split.images - mean) / deviation).astype(np.float32), split.labels)

    return {name: normalize(split) for name, split in splits.items()}

"""TFDS builders of encoded images, and how to read what they prepared."""

import dataclasses
import pathlib
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from experiments.config import ConfigError
from experiments.datasets.prepared import is_prepared, prepared
from experiments.datasets.published import Archive, found

Examples = Iterable[tuple[bytes, int]]
"""Encoded images and their labels."""


class Jpegs(tfds.core.GeneratorBasedBuilder):
    """Encoded images as they were published, with labels.

    The metadata has all labels, too, so that they can be read without the images.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "docs/data.md says what to fetch and where to put it."

    def splits(self, manual: pathlib.Path) -> dict[str, Examples]:
        """Reads the published files in a folder; returns examples by the names of the splits."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.Scalar(np.int32),
                }
            ),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        splits = self.splits(pathlib.Path(dl_manager.manual_dir))
        return {name: self._generate_examples(name, split) for name, split in splits.items()}

    def _generate_examples(
        self, name: str, examples: Examples
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        labels = self.info.metadata.setdefault(name, [])
        for key, (image, label) in enumerate(examples):
            labels.append(label)
            yield key, {"image": image, "label": label}


@dataclasses.dataclass(frozen=True)
class Blobs(Sequence[bytes]):
    """The encoded images of a prepared split: a sequence of bytes."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.source[index]["image"]


def read_again(
    builder_class: type[Jpegs], folder: pathlib.Path, archives: Sequence[Sequence[Archive]]
) -> dict[str, tuple[Blobs, np.ndarray]]:
    """Returns the images and labels of each split; prepares them the first time.

    Args:
        builder_class: Reads the published files.
        folder: The folder of data sets.
        archives: For each published file the forms that it may have.

    Raises:
        ConfigError: A file is missing, or not as it was published.
    """
    manual = None
    if not is_prepared(builder_class, folder):
        for forms in archives:
            manual = found(folder, builder_class.name, forms).parent
    try:
        builder = prepared(builder_class, folder, manual)
    except (OSError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"the files of {builder_class.name} in {manual} are not as they were published, or "
            f"can't be read: {error!r}."
        ) from error
    decoders = {"image": tfds.decode.SkipDecoding()}
    return {
        name: (
            Blobs(builder.as_data_source(split=name, decoders=decoders)),
            np.asarray(labels, np.int32),
        )
        for name, labels in builder.info.metadata.items()
    }

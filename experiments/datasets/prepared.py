"""Prepares TFDS builders on disk, without TensorFlow."""

import contextlib
import io
import pathlib
import tempfile
from collections.abc import Iterator

import tensorflow_datasets as tfds

Builder = type[tfds.core.GeneratorBasedBuilder]


def is_prepared(builder_class: Builder, folder: pathlib.Path) -> bool:
    """Whether the files of a builder are on disk, in a folder of data sets."""
    return _target(builder_class, folder).is_dir()


def _target(builder_class: Builder, folder: pathlib.Path) -> pathlib.Path:
    return folder / builder_class.name / str(builder_class.VERSION)


def prepared(
    builder_class: Builder,
    folder: pathlib.Path,
    manual: pathlib.Path | None = None,
) -> tfds.core.DatasetBuilder:
    """Returns a builder whose files are on disk.

    Any number of processes may call this at once.

    Args:
        builder_class: What is prepared, unless it is there already.
        folder: Of prepared data sets.
        manual: Of the files that the user fetched.
    """
    target = _target(builder_class, folder)
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        # Written elsewhere and then moved in one step, so that one of several processes wins, and
        # none sees half a data set.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            with _silenced(), _temporary_files_in(scratch):
                draft = builder_class(data_dir=scratch, file_format="array_record")
                # TFDS downloads nothing here, but makes a folder for downloads.
                draft.download_and_prepare(
                    download_dir=f"{scratch}/downloads",
                    download_config=tfds.download.DownloadConfig(manual_dir=manual),
                )
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

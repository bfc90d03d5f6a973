"""Reads Tiny-ImageNet from its published folders."""

import pathlib
import zipfile
from collections.abc import Callable

from experiments.datasets.jpegs import Examples, Jpegs, read_again
from experiments.datasets.photos import decoded_all
from experiments.datasets.published import Archive
from experiments.datasets.types import Split, Splits

ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
ARCHIVES = [Archive("tiny-imagenet-200.zip", ADDRESS), Archive("tiny-imagenet-200", ADDRESS)]


class TinyImagenet(Jpegs):
    """100,000 and 10,000 images of 64×64 pixels in 200 classes.

    The labels of the published test images are secret. So the published validation part is the test
    split.
    """

    def splits(self, manual: pathlib.Path) -> dict[str, Examples]:
        """Reads the zip file, or the folder that it unpacks to."""
        path = next(manual / a.name for a in ARCHIVES if (manual / a.name).exists())
        names, read = _opened(path)
        classes = sorted(read("wnids.txt").decode().split())
        label_of = {name: label for label, name in enumerate(classes)}
        annotations = read("val/val_annotations.txt").decode().splitlines()
        test = [line.split("\t")[:2] for line in annotations if line]
        train = sorted(
            name for name in names if name.startswith("train/") and name.endswith(".JPEG")
        )
        return {
            "train": ((read(name), label_of[name.split("/")[1]]) for name in train),
            "test": ((read(f"val/images/{file}"), label_of[name]) for file, name in test),
        }


def _opened(path: pathlib.Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Returns the names of the files in a zip file or a folder, and a function that reads one."""
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return files, lambda name: (path / name).read_bytes()
    archive, top = zipfile.ZipFile(path), "tiny-imagenet-200/"
    files = [name.removeprefix(top) for name in archive.namelist()]
    return files, lambda name: archive.read(top + name)


def read(folder: pathlib.Path) -> Splits:
    """Reads both splits into memory."""
    parts = read_again(TinyImagenet, folder, [ARCHIVES])
    return {name: Split(decoded_all(blobs), labels) for name, (blobs, labels) in parts.items()}

"""Reads CIFAR-10 and CIFAR-100 from their published archives."""

import io
import pathlib
import pickle
import re
import tarfile
import zlib
from typing import Any

import numpy as np

from experiments.config import ConfigError
from experiments.datasets.checks import checked
from experiments.datasets.published import Archive, found
from experiments.datasets.types import Splits

ADDRESS = "https://www.cs.toronto.edu/~kriz/"

# Names of the batches in both layouts. In the binary one, labels of one byte come before the 3072
# bytes of each image. CIFAR-100 has two labels; the fine one comes last.
_BATCHES = {
    "cifar10": {"train": r"data_batch_[1-5](\.bin)?", "test": r"test_batch(\.bin)?"},
    "cifar100": {"train": r"train(\.bin)?", "test": r"test(\.bin)?"},
}
_LABELS = {"cifar10": (b"labels", 1), "cifar100": (b"fine_labels", 2)}


def read_cifar10(folder: pathlib.Path) -> Splits:
    """Reads 50,000 and 10,000 colour images of 32×32 pixels in ten classes."""
    return _read(folder, "cifar10", "cifar-10")


def read_cifar100(folder: pathlib.Path) -> Splits:
    """Reads 50,000 and 10,000 colour images of 32×32 pixels in a hundred classes."""
    return _read(folder, "cifar100", "cifar-100")


def _read(folder: pathlib.Path, dataset: str, stem: str) -> Splits:
    names = [f"{stem}-{layout}.tar.gz" for layout in ("binary", "python")]
    path = found(folder, dataset, [Archive(name, ADDRESS + name) for name in names])
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"train": [], "test": []}
    try:
        with tarfile.open(path) as archive:
            members = {pathlib.PurePath(member.name).name: member for member in archive}
            # Sorted, so that both layouts give the same order.
            for name, member in sorted(members.items()):
                for part, pattern in _BATCHES[dataset].items():
                    if re.fullmatch(pattern, name):
                        content = archive.extractfile(member).read()  # type: ignore[union-attr]
                        parts[part].append(_batch(content, dataset, name.endswith(".bin")))
        arrays = {
            part: [np.concatenate(x) for x in zip(*batches, strict=True)]
            for part, batches in parts.items()
        }
        return {part: checked(str(path), part, *arrays[part]) for part in arrays}
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise _damaged(path, error) from error
    except (tarfile.TarError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is not as it was published, or is incomplete: {error}.")


def _batch(content: bytes, dataset: str, binary: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images (count, 32, 32, 3) and labels of a batch."""
    field, bytes_of_labels = _LABELS[dataset]
    if binary:
        rows = np.frombuffer(content, np.uint8).reshape(-1, bytes_of_labels + 3072)
        pixels, labels = rows[:, bytes_of_labels:], rows[:, bytes_of_labels - 1]
    else:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"], np.asarray(batch[field])
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class _Unpickler(pickle.Unpickler):
    """Loads only arrays, as a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        if name == "_reconstruct" and module.endswith("core.multiarray"):
            return lambda kind, shape, dtype: kind.__new__(kind, shape, dtype)
        raise pickle.UnpicklingError(f"{module}.{name} is no array")

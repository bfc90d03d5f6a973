"""Finds the files that a data set was published as, or fetches them."""

import dataclasses
import pathlib
import shutil
import tempfile
import threading
import urllib.request
from collections.abc import Sequence
from typing import Any

from experiments.config import ConfigError

SECONDS = 5.0
"""How long a server may take to answer."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published file.

    Attributes:
        name: Of the file.
        address: Where it was published; only what ends in its name can be fetched from here.
    """

    name: str
    address: str


def manual_folder(folder: pathlib.Path, dataset: str) -> pathlib.Path:
    """Returns where the published files of a data set belong, in a folder of data sets."""
    return folder / "downloads" / "manual" / dataset


def found(folder: pathlib.Path, dataset: str, archives: Sequence[Archive]) -> pathlib.Path:
    """Returns that one of some equivalent archives which is there, or fetches the first.

    Args:
        folder: Of data sets.
        dataset: Name of the data set.
        archives: Forms of one published file.

    Raises:
        ConfigError: None is there, and the first can't be fetched.
    """
    manual = manual_folder(folder, dataset)
    for archive in archives:
        if (manual / archive.name).exists():
            return manual / archive.name
    archive = archives[0]
    try:
        if not archive.address.endswith(archive.name):
            raise OSError("it asks for your name")
        _fetch(archive, manual)
    except OSError as error:
        raise ConfigError(
            f"{dataset} needs {archive.name}, which can't be fetched from here ({error}): get it "
            f"from {archive.address} and put it into {manual}."
        ) from error
    return manual / archive.name


def _fetch(archive: Archive, folder: pathlib.Path) -> None:
    """Downloads a file; what is incomplete never bears its name."""
    response = _opened(archive.address)
    folder.mkdir(parents=True, exist_ok=True)
    with response, tempfile.TemporaryDirectory(dir=folder) as scratch:
        part = pathlib.Path(scratch) / archive.name
        with part.open("wb") as file:
            shutil.copyfileobj(response, file)
        expected = response.headers.get("Content-Length")
        if expected is not None and part.stat().st_size != int(expected):
            raise OSError(f"only {part.stat().st_size} of {expected} bytes came")
        part.replace(folder / archive.name)


def _opened(address: str) -> Any:
    """Opens an address, or fails within seconds.

    `urlopen` keeps to its timeout only after the name has been looked up, which may take a minute
    without a network; so it runs in a thread that can be left behind.
    """
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append(urllib.request.urlopen(address, timeout=SECONDS))
        except (OSError, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not outcome:
        raise OSError(f"no answer within {SECONDS:g} seconds")
    if isinstance(outcome[0], Exception):
        raise OSError(str(outcome[0])) from outcome[0]
    return outcome[0]

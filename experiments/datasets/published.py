"""Finds or fetches the published files of a data set."""

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
        name: The file's name.
        address: Where it was published; it can be fetched only if the address ends in its name.
    """

    name: str
    address: str


def manual_folder(folder: pathlib.Path, dataset: str) -> pathlib.Path:
    """Returns where the published files of a data set belong, in a folder of data sets."""
    return folder / "downloads" / "manual" / dataset


def found(folder: pathlib.Path, dataset: str, archives: Sequence[Archive]) -> pathlib.Path:
    """Returns the first of several equivalent archives that exists, or fetches the first one.

    Args:
        folder: The folder of data sets.
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
    """Downloads a file; it gets its name only when it is complete."""
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

    The timeout of `urlopen` starts only after the name has been looked up, which may take a minute
    without a network. So it runs in a thread that is abandoned after the timeout.
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

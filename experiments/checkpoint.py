"""Checkpoints of a training run, by orbax."""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments.config import Config, ConfigError


class Checkpoints:
    """The newest state of one job, in a separate folder. Use it as a context manager.

    Args:
        folder: Where the checkpoints are; made if it does not exist.
        config: The job. A folder belongs to one job for good.
        made_by: What else must match to continue from a checkpoint, as JSON. A checkpoint made by
            other code, or by other settings of the method, is dropped.
    """

    def __init__(
        self, folder: pathlib.Path, config: Config, made_by: Mapping[str, Any] | None = None
    ) -> None:
        self._folder = folder
        self._config = config
        self._made_by = json.loads(json.dumps(dict(made_by or {})))
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._folder.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, epoch: int, state: Any, masks: Any, progress: dict[str, Any]) -> None:
        """Writes a checkpoint and removes the one before; returns when it is on disk.

        Args:
            epoch: Epochs done.
            state: Pytree of arrays.
            masks: Nested dict of arrays.
            progress: Everything else to keep, as JSON.
        """
        document = {
            "config": self._config.as_dict(),
            "made_by": self._made_by,
            "progress": progress,
            "sha256": {"state": _digest(state), "masks": _digest(masks)},
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            masks=ocp.args.StandardSave(masks),
            document=ocp.args.JsonSave(document | {"checked": _digest_of_text(document)}),
        )
        self._manager.save(epoch, args=items)

    def progress(self) -> dict[str, Any] | None:
        """Returns the progress of the newest checkpoint, or None if there is none to continue from.

        Raises:
            ConfigError: The folder holds another job's checkpoints, or a damaged one.
        """
        if self._manager.latest_step() is None:
            return None
        document = self._document()
        if document["config"] != self._config.as_dict():
            raise ConfigError(
                f"workdir {self._folder} holds a checkpoint of another job, "
                f"{Config.of(document['config'])}; this one is {self._config}."
            )
        if document["made_by"] != self._made_by:
            self._manager.close()
            shutil.rmtree(self._folder)
            self._manager = self._open()
            return None
        return document["progress"]

    def masks(self) -> Any:
        """Returns the masks of the newest checkpoint."""
        return self._checked("masks", ocp.args.StandardRestore())

    def state(self, template: Any) -> Any:
        """Returns the state of the newest checkpoint.

        Args:
            template: Pytree of `jax.ShapeDtypeStruct` with the state's structure.
        """
        return self._checked("state", ocp.args.StandardRestore(template))

    def _checked(self, name: str, how: Any) -> Any:
        tree = self._restore(name, how)
        if _digest(tree) != self._document()["sha256"][name]:
            raise self._damaged()
        return tree

    def _document(self) -> dict[str, Any]:
        document = self._restore("document", ocp.args.JsonRestore())
        if not isinstance(document, dict) or document.pop("checked", 0) != _digest_of_text(
            document
        ):
            raise self._damaged()
        return document

    def _restore(self, name: str, how: Any) -> Any:
        step = self._manager.latest_step()
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{name: how}))[name]
        except Exception as error:  # orbax has no specific error for damaged arrays
            raise self._damaged() from error

    def _damaged(self) -> ConfigError:
        return ConfigError(
            f"the checkpoint in {self._folder} is damaged; delete that folder, or use --again."
        )


def _digest(tree: Any) -> str:
    """A hash of the names, types and values of all arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _digest_of_text(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

"""Checkpoints of a training run, by orbax."""

import pathlib
from typing import Any, Self

import orbax.checkpoint as ocp

from experiments.config import Config, ConfigError


class Checkpoints:
    """The newest state of one job, in a folder of its own. Use it as a context manager.

    Args:
        folder: Where the checkpoints lie; made if need be.
        config: The job. A folder belongs to one job for good.
    """

    def __init__(self, folder: pathlib.Path, config: Config) -> None:
        self._folder = folder
        self._config = config
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def save(self, epoch: int, state: Any, masks: Any, progress: dict[str, Any]) -> None:
        """Writes a checkpoint and drops the one before; returns when it is on disk.

        Args:
            epoch: Epochs done.
            state: Pytree of arrays.
            masks: Nested dict of arrays.
            progress: Whatever else must survive, as JSON.
        """
        document = {"config": self._config.as_dict(), "progress": progress}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            masks=ocp.args.StandardSave(masks),
            document=ocp.args.JsonSave(document),
        )
        self._manager.save(epoch, args=items)

    def progress(self) -> dict[str, Any] | None:
        """Returns the progress of the newest checkpoint, None where there is none.

        Raises:
            ConfigError: The folder holds another job's checkpoints.
        """
        if self._manager.latest_step() is None:
            return None
        document = self._restore(document=ocp.args.JsonRestore()).document
        if document["config"] != self._config.as_dict():
            raise ConfigError(
                f"workdir {self._folder} holds a checkpoint of another job, "
                f"{Config(**document['config'])}; this one is {self._config}."
            )
        return document["progress"]

    def masks(self) -> Any:
        """Returns the masks of the newest checkpoint."""
        return self._restore(masks=ocp.args.StandardRestore()).masks

    def state(self, template: Any) -> Any:
        """Returns the state of the newest checkpoint.

        Args:
            template: Pytree of `jax.ShapeDtypeStruct` with the state's structure.
        """
        return self._restore(state=ocp.args.StandardRestore(template)).state

    def _restore(self, **items: Any) -> Any:
        return self._manager.restore(self._manager.latest_step(), args=ocp.args.Composite(**items))

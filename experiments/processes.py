"""Several processes, on one or more machines, that run one sweep."""

from collections.abc import Sequence
from typing import Literal

from experiments.config import Config, ConfigError

Share = Literal["jobs", "batch"]
"""What processes share: the jobs, each trained by one process; or the batches of each job."""


def join(
    todo: Sequence[Config],
    share: Share,
    processes: int | None = None,
    process: int | None = None,
    coordinator: str | None = None,
) -> list[Config]:
    """Joins the other processes. Call it before JAX is used.

    Args:
        todo: The jobs of all processes.
        share: What the processes share.
        processes: How many there are. Not needed if processes share jobs through one folder, or
            share batches on a cluster that JAX finds by itself.
        process: The number of this process, from 0.
        coordinator: Address of process 0 as HOST:PORT, to share batches.

    Returns:
        The jobs of this process.

    Raises:
        ConfigError: The numbers make no sense, or there is no cluster.
    """
    if (processes is None) != (process is None):
        raise ConfigError(f"processes and process need each other; got {processes} and {process}.")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"process must lie in [0, {processes}); got {process}.")
    if share == "batch":
        _initialize(processes, process, coordinator)
        return list(todo)
    if coordinator is not None:
        raise ConfigError(f"coordinator needs share batch; got {coordinator!r} and share jobs.")
    return list(dict.fromkeys(todo))[process or 0 :: processes or 1]


def _initialize(processes: int | None, process: int | None, coordinator: str | None) -> None:
    import jax

    try:
        jax.distributed.initialize(coordinator, processes, process)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"share batch needs a cluster that JAX finds, or coordinator, processes and process: "
            f"{str(error).splitlines()[0]}"
        ) from error

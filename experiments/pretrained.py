"""Weights to start from, read from a checkpoint of Flax, of safetensors or of orbax."""

import os
import pathlib
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

from experiments.config import ConfigError

_COLLECTIONS = ("params", "batch_stats")

# Where orbax puts a checkpoint: in the folder itself, or as an item of a step.
_ITEMS = (".", "default", "state", "params")
_MARK = "_METADATA"


def load_variables(path: str | os.PathLike[str], variables: Any) -> Any:
    """Returns a network's variables with the values of a checkpoint.

    Names may be joined by "/" or ".", with or without "params" in front. Anything in the file
    besides "params" and "batch_stats", such as an optimizer's state, is ignored. If the file has no
    running statistics, they stay as they are.

    Args:
        path: A file that `flax.serialization` wrote (`.msgpack`), a safetensors file
            (`.safetensors`), or an orbax folder: a checkpoint, or a manager's folder, of which the
            newest checkpoint is read. A job's folder of checkpoints works too.
        variables: Dict of "params" and, if the network has them, "batch_stats".

    Returns:
        New variables of the same structure, shapes and dtypes.

    Raises:
        ConfigError: There is no such file, it can't be read, or a name or shape differs.
    """
    found = _read(check_exists(path))
    own = jax.tree.leaves(variables)
    names = _names(variables)
    if not any(name.startswith("batch_stats/") for name in found):
        kept = {n: x for n, x in zip(names, own, strict=True) if n.startswith("batch_stats/")}
        found = found | kept
    differences = {
        "lacks": [name for name in names if name not in found],
        "has besides": [name for name in found if name not in names],
        "has another shape of": [
            f"{name} ({np.shape(found[name])}, not {x.shape})"
            for name, x in zip(names, own, strict=True)
            if name in found and np.shape(found[name]) != x.shape
        ],
    }
    said = [f"{what} {_some(those)}" for what, those in differences.items() if those]
    if said:
        raise ConfigError(f"init {path} holds another network: it {' and '.join(said)}.")
    loaded = [jnp.asarray(found[name], x.dtype) for name, x in zip(names, own, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(variables), loaded)


def check_exists(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of a checkpoint.

    Raises:
        ConfigError: There is nothing, or it is not a checkpoint.
    """
    place = pathlib.Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"init must be a file or folder that exists; got {os.fspath(path)!r}.")
    if not place.is_dir() and place.suffix not in (".msgpack", ".safetensors"):
        raise ConfigError(
            "init must be a .msgpack or .safetensors file or a folder of orbax; "
            f"got {os.fspath(path)!r}."
        )
    return place


def _read(place: pathlib.Path) -> dict[str, Any]:
    """Returns a checkpoint's params and statistics by names such as "params/head/kernel"."""
    try:
        if place.is_dir():
            tree = _read_orbax(place)
        elif place.suffix == ".safetensors":
            tree = safetensors.numpy.load_file(place)
        else:
            tree = flax.serialization.msgpack_restore(place.read_bytes())
        flat = flax.traverse_util.flatten_dict(tree)
    except OSError:
        raise
    except Exception as error:  # each format has its own
        raise ConfigError(f"init {place} can't be read: {error}".splitlines()[0]) from error
    named = {"/".join(map(str, path)).replace(".", "/"): leaf for path, leaf in flat.items()}
    if not any(name.startswith("params/") for name in named):
        statistics = "batch_stats/"
        named = {n if n.startswith(statistics) else f"params/{n}": x for n, x in named.items()}
    return {name: x for name, x in named.items() if name.split("/")[0] in _COLLECTIONS}


def _read_orbax(folder: pathlib.Path) -> Any:
    steps = [place for place in folder.iterdir() if place.name.isdecimal()]
    newest_first = sorted(steps, key=lambda step: int(step.name), reverse=True)
    for place in (folder, *newest_first):
        for item in _ITEMS:
            if (place / item / _MARK).exists():
                return _restore((place / item).absolute())
    raise ValueError("it has no checkpoint of orbax")


def _restore(folder: pathlib.Path) -> Any:
    handler = ocp.PyTreeCheckpointHandler()
    try:
        tree = handler.metadata(folder).tree
        # NumPy arrays can be restored whatever devices there are.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    finally:
        handler.close()


def _names(variables: Any) -> list[str]:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    joined = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    return [name.replace(".", "/") for name in joined]


def _some(names: list[str]) -> str:
    """The first three of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

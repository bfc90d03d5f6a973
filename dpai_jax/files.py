"""Pruned networks as files that any program can read.

A file is in the safetensors format: the length of the header in eight bytes, the header in JSON,
then the arrays one after another. For a leaf `params/Dense_0/kernel` of the parameters it holds

- `masks/params/Dense_0/kernel`: bytes of eight mask entries each, in C order, the first entry in
  the highest bit, as `numpy.unpackbits` reads them;
- `scores/params/Dense_0/kernel`: float32 of the leaf's shape.

There is an array `history/NAME` for each thing that the method measured. Everything else is JSON,
in the text `dpai_jax` of the header's `__metadata__`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dpai_jax.measuring import LayerTopology, Topology
from dpai_jax.pruning import Result
from dpai_jax.tools import meshes
from dpai_jax.tools.drafts import write_whole
from dpai_jax.tools.trees import named_leaves, shown

PyTree = Any

FORMAT = 1
"""The version of the layout described above."""


def save(path: str | os.PathLike[str], result: Result) -> None:
    """Writes a pruned network's masks, scores, history and settings to one file.

    The file is there whole or not at all. Its layout is in `dpai_jax.files`; it holds nothing that
    reading could execute. Of several processes all must call this, and the first one writes.

    Example:
      >>> import tempfile, jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((8, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.5, method=dpai.Random())
      >>> file = tempfile.mkdtemp() + "/masks.safetensors"
      >>> dpai.save(file, result)
      >>> dpai.load(file, params)
      Result(16 of 32 weights kept, 16 effective, 4 nodes, 16 kernels, log_paths=2.77)

    Args:
      path: where; a file of that name is replaced.
      result: what `prune` returned.

    Raises:
      TypeError: if `result` is not a result.
      ValueError: if two leaves of the masks have the same name.
      OSError: if the file cannot be written.
    """
    import safetensors.numpy  # here, so that importing the library stays quick

    if not isinstance(result, Result):
        raise TypeError(f"result must be what prune returned, got {shown(result)}")
    masks, scores = _by_name(result.masks), _by_name(result.scores)
    arrays = {f"masks/{name}": np.packbits(mask) for name, mask in masks.items() if mask.ndim}
    arrays |= {
        f"scores/{name}": score.astype(np.float32) for name, score in scores.items() if score.ndim
    }
    arrays |= {f"history/{name}": np.ascontiguousarray(x) for name, x in result.history.items()}
    topology = dataclasses.asdict(result.topology)
    about = {
        "format": FORMAT,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        # JSON has no infinity.
        "topology": topology | {"log_paths": repr(result.topology.log_paths)},
        "settings": dict(result.settings),
        "seconds": result.seconds,
    }
    data = safetensors.numpy.save(arrays, {"dpai_jax": json.dumps(about, allow_nan=False)})
    if jax.process_index() == 0:
        write_whole(pathlib.Path(path), data)


def load(path: str | os.PathLike[str], params: PyTree) -> Result:
    """Reads what `save` has written.

    Example:
      >>> import tempfile, jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda params, x: x @ params["w"], {"w": jnp.ones((8, 4))}
      >>> result = dpai.prune(fn, params, jnp.ones((1, 8)), 0.5, method=dpai.Random())
      >>> file = tempfile.mkdtemp() + "/masks.safetensors"
      >>> dpai.save(file, result)
      >>> dpai.load(file, params).settings["sparsity"]
      0.5

    Args:
      path: the file.
      params: the parameters of the network, or their shapes.

    Returns:
      The result, as it was saved, its masks and scores sharded as `params`. It has no `net`.

    Raises:
      ValueError: if the file is damaged or of another kind, or was saved for other parameters; the
        message says which leaf differs.
      OSError: if it cannot be read.
    """
    arrays, about = _read(pathlib.Path(path))
    shapes = {name: tuple(shape) for name, shape in about["shapes"].items()}
    leaves, structure = named_leaves(params)
    _check_fit(path, shapes, leaves)
    _check_arrays(path, shapes, arrays)
    masks: list[Any] = []
    scores: list[Any] = []
    for name, _ in leaves:
        shape = shapes[name]
        if not shape:
            masks.append(jnp.ones((), bool))
            scores.append(np.float32(0))
            continue
        bits = np.unpackbits(arrays[f"masks/{name}"], count=math.prod(shape))
        masks.append(jnp.asarray(bits.astype(bool).reshape(shape)))
        scores.append(jnp.asarray(arrays[f"scores/{name}"]))
    like = [leaf for _, leaf in leaves]
    topology = about["topology"]
    net: Any = None  # a trace cannot be saved
    return Result(
        masks=structure.unflatten(meshes.device_put_like(masks, like)),
        scores=structure.unflatten(meshes.device_put_like(scores, like)),
        topology=Topology(
            float(topology["log_paths"]),
            tuple(
                LayerTopology(**layer | {"shape": tuple(layer["shape"])})
                for layer in topology["layers"]
            ),
        ),
        history={
            name.removeprefix("history/"): array
            for name, array in arrays.items()
            if name.startswith("history/")
        },
        seconds=about["seconds"],
        settings=about["settings"],
        net=net,
    )


def _by_name(tree: PyTree) -> dict[str, np.ndarray]:
    leaves, _ = named_leaves(tree)
    arrays = {name: meshes.on_host(leaf) for name, leaf in leaves}
    if len(arrays) < len(leaves):
        names = [name for name, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"result must name each leaf differently, but two are {twice!r}")
    return arrays


def _read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            about = json.loads((file.metadata() or {})["dpai_jax"])
            if about["format"] != FORMAT:
                raise ValueError(f"path must be a file of format {FORMAT}, but {path} has another")
            return {name: file.get_tensor(name) for name in file.offset_keys()}, about
    except (safetensors.SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"path must be a file that save wrote, but {path} is not") from error


def _check_arrays(
    path: str | os.PathLike[str],
    shapes: dict[str, tuple[int, ...]],
    arrays: dict[str, np.ndarray],
) -> None:
    """Refuses a file whose arrays are not those of its shapes."""
    for leaf, shape in shapes.items():
        if not shape:
            continue
        bytes_of_bits = (-(-math.prod(shape) // 8),)
        wanted = {f"masks/{leaf}": bytes_of_bits, f"scores/{leaf}": shape}
        for name, own in wanted.items():
            found = arrays[name].shape if name in arrays else "none"
            if found != own:
                raise ValueError(
                    f"path must be a file that save wrote, but in {path} {name} has shape {found} "
                    f"where it needs {own}"
                )


def _check_fit(
    path: str | os.PathLike[str], shapes: dict[str, tuple[int, ...]], leaves: list[tuple[str, Any]]
) -> None:
    """Raises a ValueError unless the parameters are those that the file was saved for."""
    names = [name for name, _ in leaves]
    for name in names:
        if name not in shapes:
            raise ValueError(f"params must be those of {path}, but it has no leaf {name!r}")
    for name in shapes:
        if name not in set(names):
            raise ValueError(f"params must be those of {path}, but they have no leaf {name!r}")
    for name, leaf in leaves:
        # A leaf that is not prunable has a mask without dimensions.
        if shapes[name] and tuple(leaf.shape) != shapes[name]:
            raise ValueError(
                f"params must be those of {path}, but {name} is {list(leaf.shape)} where the file "
                f"has {list(shapes[name])}"
            )

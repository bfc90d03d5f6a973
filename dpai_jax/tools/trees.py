"""Pytrees by name."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def shown(value: Any) -> str:
    """A value as shown in an error: short, and on one line."""
    if isinstance(value, jax.Array | np.ndarray) and np.ndim(value):
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, dict | list | tuple):
        leaves = jax.tree.leaves(value)
        if len(leaves) > 4 or any(np.ndim(leaf) for leaf in leaves):
            return f"a {type(value).__name__} of {len(leaves)} leaves"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a pytree with their names, such as `params/Dense_0/kernel`; its structure."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths)
    return [(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True)], treedef


def check_structure(tree: Any, like: Any, argument: str, of: str) -> None:
    """Raises a ValueError unless a tree has the structure `like` of the argument `of`."""
    if jax.tree.structure(tree) != like:
        raise ValueError(
            f"{argument} must have the tree structure of {of}, but {_difference(tree, like)}"
        )


def _difference(tree: Any, like: Any) -> str:
    """Says which leaf of a tree first differs from a structure, and what may have been meant."""
    if hasattr(tree, "masks") and hasattr(tree, "scores"):
        return "is a Result: pass its .masks or .scores"
    found = [name for name, _ in named_leaves(tree)[0]]
    wanted = [name for name, _ in named_leaves(like.unflatten(range(like.num_leaves)))[0]]
    missing = next((name for name in wanted if name not in set(found)), None)
    extra = next((name for name in found if name not in set(wanted)), None)
    if missing is None and extra is None:
        return "its nodes are of other types"
    if extra is not None and missing is not None and extra == f"params/{missing}":
        return f'has {extra!r} where {missing!r} belongs: pass its "params" alone'
    if extra is not None and missing is not None and missing == f"params/{extra}":
        return f'has {extra!r} where {missing!r} belongs: put it in {{"params": ...}}'
    return f"has no leaf {missing!r}" if missing is not None else f"has a leaf {extra!r} besides"


def like_by_name(tree: Any, like: Any, argument: str, of: str) -> Any:
    """Gives a tree the structure of another one whose leaves have the same names.

    The ending `value` of names in Flax NNX's variables is ignored.

    Raises:
      ValueError: if the names differ.
    """
    structure: Any = jax.tree.structure(like)
    if jax.tree.structure(tree) == structure:
        return tree
    by_name = {_plain(name): leaf for name, leaf in named_leaves(tree)[0]}
    names = [_plain(name) for name, _ in named_leaves(like)[0]]
    if set(names) != set(by_name):
        check_structure(tree, structure, argument, of)
    return structure.unflatten([by_name[name] for name in names])


def _plain(name: str) -> str:
    return name.removesuffix("/value").removesuffix("/raw_value")

"""Pytrees by name."""

from __future__ import annotations

from typing import Any

import jax


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves of a pytree with their paths, such as `params/Dense_0/kernel`; its structure."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths)
    return [(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True)], treedef


def check_structure(tree: Any, like: Any, argument: str, of: str) -> None:
    """Raises a ValueError unless a tree has the structure `like`, that of the argument `of`."""
    structure: Any = jax.tree.structure(tree)
    if structure != like:
        raise ValueError(
            f"{argument} must have the tree structure of {of}, {like}, got {structure}"
        )

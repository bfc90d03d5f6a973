"""Masks: which weights stay. Made from scores, applied to parameters.

Masks and scores are pytrees parallel to the parameters. A leaf that is not prunable has the mask
`True` and the score `0.`, both without dimensions, so that `jax.tree.map(f, params, masks)` works
on whole trees and broadcasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks, grouping, selection
from dpai_jax.allocation import Keep, checked_count, is_total
from dpai_jax.tools import meshes
from dpai_jax.tools.switches import usual_switches
from dpai_jax.tools.trees import check_structure, named_leaves

PyTree = Any


@usual_switches()
def binarize(scores: PyTree, keep: PyTree | int) -> PyTree:
    """The masks that keep the weights of the highest scores, in each layer or over all layers.

    Exactly as many as asked: of equal scores those of lower index (in C order, layer by layer)
    come first. Pure, and jittable.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> scores = {"kernel": jnp.array([[1.0, 3.0], [3.0, 2.0]]), "bias": jnp.array(0.0)}
      >>> dpai.binarize(scores, {"kernel": 2, "bias": 0})["kernel"].tolist()
      [[False, True], [True, False]]

    Args:
      scores: pytree parallel to the parameters: a floating array at each layer, and a scalar at a
        leaf that is not prunable.
      keep: pytree parallel to it of the number of weights to keep, as `erk` returns it; or one
        number for all layers together, as `global_threshold` returns it.

    Returns:
      Pytree of boolean masks.

    Raises:
      TypeError: if a leaf of `scores` is not floating, or a number of `keep` no integer.
      ValueError: if `keep` has another structure, or a number outside [0, size]; if a score is NaN
        (outside of `jax.jit`).
    """
    named, treedef = named_leaves(scores)
    for name, score in named:
        checks.score_array(name, score)
    layers = [(name, score) for name, score in named if jnp.ndim(score)]
    if is_total(keep, treedef):
        numbers: Any = checked_count(keep, sum(score.size for _, score in layers))
    else:
        check_structure(keep, treedef, "keep", "scores")
        pairs = zip(named, treedef.flatten_up_to(keep), strict=True)
        numbers = [
            checked_count(number, score.size, name)
            for (name, score), number in pairs
            if jnp.ndim(score)
        ]
    masks = iter(select_layers([score for _, score in layers], numbers))
    return treedef.unflatten(
        [next(masks) if jnp.ndim(score) else jnp.ones((), bool) for _, score in named]
    )


def select_layers(scores: Sequence[Array], keep: Keep, parts: grouping.Parts = ()) -> list[Array]:
    """The masks of the highest scores, of lists over the layers (see `grouping.select`)."""
    numbers = jax.tree.map(selection.as_count, keep)
    masks: list[Array] = _select(None, list(scores), numbers, parts=parts)
    return masks


@meshes.program(
    like=lambda scores, _: scores,
    layers=lambda scores, _: scores,
    by_numpy=lambda parts: "exactly" if parts else _select_by_numpy,
)
def _select(
    _: None, scores: list[Array], keep: list[Array] | Array, *, parts: grouping.Parts
) -> list[Array]:
    return grouping.select(scores, keep, parts=parts)[0]


def _select_by_numpy(scores: list[np.ndarray], keep: Any) -> list[np.ndarray]:
    return selection.select_by_numpy(scores, keep)[0]


@usual_switches()
def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """The parameters with pruned weights at zero.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> params = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([3.0])}
      >>> masks = {"kernel": jnp.array([[True, False]]), "bias": jnp.array(True)}
      >>> dpai.apply_masks(params, masks)["kernel"].tolist()
      [[1.0, 0.0]]

    Args:
      params: pytree of arrays.
      masks: pytree parallel to it of boolean masks.

    Returns:
      Pytree like `params`, of the same dtypes.

    Raises:
      ValueError: if the masks have another structure, or a shape that does not fit.
      TypeError: if a mask is not boolean.
    """
    checks.parallel_masks(params, masks)
    return jax.tree.map(masked, params, masks)


def masked(array: Any, mask: Any) -> Any:
    """The array with zeros where the mask is false; untouched under a mask without dimensions."""
    if jnp.ndim(mask) == 0:
        return array
    return jnp.where(mask, array, jnp.zeros((), jnp.result_type(array)))


@usual_switches()
def shuffled(masks: PyTree, key: Array) -> PyTree:
    """The masks with the entries of each leaf in random order: the same densities, by chance.

    This control tells how much of a method's success is due to the density of each layer, and how
    much to the choice of its weights.

    Example:
      >>> import jax, jax.numpy as jnp, dpai_jax as dpai
      >>> masks = {"kernel": jnp.arange(8).reshape(4, 2) < 3, "bias": jnp.array(True)}
      >>> int(dpai.shuffled(masks, jax.random.key(0))["kernel"].sum())
      3

    Args:
      masks: pytree of boolean masks.
      key: random key.

    Returns:
      Pytree like `masks`; each leaf keeps as many weights as before.

    Raises:
      TypeError: if a mask is not boolean, or `key` is not a random key.

    References:
      Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?,
      ICLR 2021.
    """
    named, treedef = named_leaves(masks)
    for name, mask in named:
        checks.boolean(name, mask)
    leaves, key = [mask for _, mask in named], checks.key(key)
    keys = jax.random.split(key, max(len(leaves), 1))
    moved = [
        jax.random.permutation(k, jnp.ravel(leaf)).reshape(jnp.shape(leaf))
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, moved)

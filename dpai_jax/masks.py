"""Masks: which weights stay. Made from scores, applied to parameters.

Masks and scores are pytrees parallel to the parameters. A leaf that is not prunable has the mask
`True` and the score `0.`, both without dimensions, so that `jax.tree.map(f, params, masks)` works
on whole trees and broadcasts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax.paths import Network
from dpai_jax.paths.meshes import Shardings, automatic, laid_out, shardings_of
from dpai_jax.paths.trees import check_structure, named_leaves
from dpai_jax.selection import as_count, select

PyTree = Any


def binarize(scores: PyTree, keep: PyTree | int) -> PyTree:
    """The masks that keep the weights of the highest scores, in each layer or over all layers.

    Exactly as many as asked: of equal scores those of lower index (in C order, layer by layer)
    come first. Pure, and jittable.

    Args:
      scores: pytree parallel to the parameters: a floating array at each layer, and a scalar at a
        leaf that is not prunable.
      keep: pytree parallel to it of the number of weights to keep, as `erk` returns it; or one
        number for all layers together, as `weights_to_keep` returns it.

    Returns:
      Pytree of boolean masks.

    Raises:
      TypeError: if a leaf of `scores` is not floating.
      ValueError: if `keep` has another structure, or a number outside [0, size]; if a score is NaN
        (outside of `jax.jit`).
    """
    named, treedef = named_leaves(scores)
    for name, score in named:
        _check_scores(name, score)
    layers = [(name, score) for name, score in named if jnp.ndim(score)]
    if is_total(keep, treedef):
        _check_count("all layers", sum(math.prod(jnp.shape(score)) for _, score in layers), keep)
        counts: Any = as_count(keep)
    else:
        check_structure(keep, treedef, "keep", "scores")
        each = zip(named, treedef.flatten_up_to(keep), strict=True)
        kept = [(name, score, count) for (name, score), count in each if jnp.ndim(score)]
        for name, score, count in kept:
            _check_count(name, math.prod(jnp.shape(score)) // math.prod(np.shape(count)), count)
        counts = [as_count(count) for _, _, count in kept]
    arrays = [score for _, score in layers]
    masks = iter(_select(shardings_of(arrays), arrays, counts))
    return treedef.unflatten(
        [next(masks) if jnp.ndim(score) else jnp.ones((), bool) for _, score in named]
    )


def is_total(keep: Any, treedef: Any) -> bool:
    """Whether the number of weights to keep is one for all layers of a tree together."""
    is_number = jax.tree_util.all_leaves([keep]) and jnp.ndim(keep) == 0
    return is_number and jax.tree.structure(keep) != treedef


def _check_scores(name: str, score: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(score), jnp.floating):
        raise TypeError(f"scores must be floating, but {name} is {jnp.result_type(score)}")
    if not isinstance(score, jax.core.Tracer):
        check_numbers(name, score)


def check_numbers(name: str, score: Any) -> None:
    """Raises a ValueError if a score of a layer is NaN."""
    if bool(jnp.any(jnp.isnan(score))):
        raise ValueError(f"scores must be numbers, but {name} has a NaN")


def _check_count(name: str, size: int, keep: Any) -> None:
    if not isinstance(keep, jax.core.Tracer) and (np.min(keep) < 0 or np.max(keep) > size):
        raise ValueError(f"keep must be in [0, {size}] for {name}, got {keep}")


@functools.partial(jax.jit, static_argnums=0)
def _select(shardings: Shardings, scores: list[Array], keep: list[Array] | Array) -> list[Array]:
    masks, _ = automatic(select, scores, keep, like=(scores, None))
    return laid_out(masks, shardings)


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
    check_masks(params, masks)
    return jax.tree.map(masked, params, masks)


def masked(array: Any, mask: Any) -> Any:
    """The array with zeros where the mask is false; untouched under a mask without dimensions."""
    if jnp.ndim(mask) == 0:
        return array
    return jnp.where(mask, array, jnp.zeros((), jnp.result_type(array)))


def check_masks(params: PyTree, masks: PyTree) -> None:
    """Raises unless masks fit parameters (see `apply_masks`)."""
    named, treedef = named_leaves(params)
    check_structure(masks, treedef, "masks", "params")
    for (name, param), mask in zip(named, treedef.flatten_up_to(masks), strict=True):
        dtype = jnp.result_type(mask)
        if not jnp.issubdtype(dtype, jnp.bool_):
            raise TypeError(f"masks must be boolean, but {name} is {dtype}")
        if jnp.ndim(mask) and jnp.shape(mask) != jnp.shape(param):
            raise ValueError(
                f"masks must have shape {jnp.shape(param)} at {name}, got {jnp.shape(mask)}"
            )


def shuffled(masks: PyTree, key: Array) -> PyTree:
    """The masks with the entries of each leaf in random order: the same densities, by chance.

    The control that tells what of a method lies in the density of each layer, and what in the
    choice of its weights.

    Args:
      masks: pytree of boolean masks.
      key: random key.

    Returns:
      Pytree like `masks`; each leaf keeps as many weights as before.

    References:
      Frankle et al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?,
      ICLR 2021.
    """
    leaves, treedef = jax.tree.flatten(masks)
    keys = jax.random.split(key, max(len(leaves), 1))
    moved = [
        jax.random.permutation(k, jnp.ravel(leaf)).reshape(jnp.shape(leaf))
        for k, leaf in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, moved)


def ones(net: Network, params: PyTree) -> PyTree:
    """The masks that prune nothing, on the devices where the parameters are."""
    pairs = zip(net.layers, shardings_of(net.leaves(params)), strict=True)
    return from_layers(net, [jnp.ones(layer.shape, bool, device=s) for layer, s in pairs])


def from_layers(net: Network, masks: Sequence[Array]) -> PyTree:
    """The tree of masks that has these at the layers."""
    return net.tree(list(masks), lambda: jnp.ones((), bool))

"""Checks of arguments. Each raises one sentence with the argument's name and the value given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax.paths import Network
from dpai_jax.tools import meshes
from dpai_jax.tools.host import Quick
from dpai_jax.tools.rows import are_small, counts_of, groups_of, in_order
from dpai_jax.tools.trees import check_structure, named_leaves, shown

PyTree = Any


# What a number must be: in words, and as a test.
POSITIVE = "positive", lambda x: x > 0
FRACTION = "in [0, 1]", lambda x: 0 <= x <= 1


def number(
    name: str,
    value: Any,
    wanted: str = "a number",
    holds: Callable[[Any], bool] = lambda x: not math.isnan(x),
) -> None:
    """Checks that a value is a real number and meets a condition, which `wanted` describes."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not holds(value):
        error: type[Exception] = ValueError if is_number else TypeError
        raise error(f"{name} must be {wanted}, got {shown(value)}")


def whole(name: str, value: Any, least: int) -> None:
    """Checks that a value is an integer of at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def flag(name: str, value: Any) -> None:
    """Checks that a value is True or False."""
    if not isinstance(value, bool | np.bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def one_of(name: str, value: Any, options: Iterable[str]) -> None:
    """Checks that a value is one of several names."""
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} must be one of {', '.join(options)}, got {shown(value)}")


def function(name: str, value: Any, call: str) -> None:
    """Checks that a value is a function; `call` shows how it is called."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {call}, got {shown(value)}")


def optimizer(name: str, value: Any) -> None:
    """Checks that a value is an optax optimizer."""
    if callable(getattr(value, "init", None)) and callable(getattr(value, "update", None)):
        return
    hint = "; call it with its learning rate" if callable(value) else ""
    raise TypeError(
        f"{name} must be an optax optimizer such as optax.adam(1e-3), got {shown(value)}{hint}"
    )


def network(net: Any) -> None:
    """Checks that `net` is a traced network."""
    if not isinstance(net, Network):
        raise TypeError(f"net must be a Network, as dpai_jax.trace returns it, got {shown(net)}")


def key(value: Any) -> Array:
    """Checks a random key; returns it, or `jax.random.key(0)` for None."""
    if value is None:
        return jax.random.key(0)
    dtype = getattr(value, "dtype", None)
    is_new = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_old = dtype == jnp.uint32 and jnp.ndim(value) == 1
    if not (is_new and jnp.ndim(value) == 0) and not is_old:
        raise TypeError(f"key must be one random key such as jax.random.key(0), got {shown(value)}")
    checked: Array = value
    return checked


def layers(net: Any, tree: PyTree, argument: str) -> list[Any]:
    """Checks that a tree fits the network; returns its arrays at the layers.

    Raises:
      TypeError: if `net` is not a network, or a leaf is not an array.
      ValueError: if the tree's structure, or a leaf's shape, is not that of the parameters.
    """
    network(net)
    check_structure(tree, net.treedef, argument, "params")
    leaves = net.leaves(tree)
    for layer, leaf in zip(net.layers, leaves, strict=True):
        if np.shape(leaf) != layer.shape:
            raise ValueError(
                f"{argument} must have shape {layer.shape} at {layer.name}, got {np.shape(leaf)}"
            )
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"{argument} must hold arrays, but {layer.name} is {shown(leaf)}")
    return leaves


def weighted_masks(net: Any, masks: PyTree) -> list[Array]:
    """Checks masks of any numbers that are not negative; returns the layers' as float32."""
    leaves = _masks_of(net, masks, lambda m: m >= 0, "have neither negative numbers nor NaN")
    return [jnp.asarray(mask, jnp.float32) for mask in leaves]


def masks(net: Any, masks: PyTree) -> list[Array]:
    """Checks masks of booleans, or of zeros and ones; returns the layers' as booleans."""
    leaves = _masks_of(net, masks, lambda m: (m == 0) | (m == 1), "be booleans or zeros and ones")
    return [jnp.asarray(mask).astype(bool) for mask in leaves]


def _masks_of(net: Any, masks: PyTree, holds: Callable[[Array], Array], wanted: str) -> list[Array]:
    """Checks that each entry of the layers' masks meets a condition; booleans always do."""
    leaves = layers(net, masks, "masks")
    for layer, mask in zip(net.layers, leaves, strict=True):
        if not _is_traced(mask) and mask.dtype != bool and not bool(jnp.all(holds(mask))):
            raise ValueError(f"masks must {wanted}, but those of {layer.name} do not")
    return leaves


def scores(net: Any, tree: PyTree) -> list[Array]:
    """Checks that scores are floating and have no NaN; returns the layers'."""
    leaves = layers(net, tree, "scores")
    for layer, score in zip(net.layers, leaves, strict=True):
        score_array(layer.name, score)
    return [jnp.asarray(score) for score in leaves]


def score_array(name: str, score: Any) -> None:
    """Checks the scores of one layer."""
    dtype = jnp.result_type(score)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"scores must be floating, but {name} is {dtype}")
    if not _is_traced(score) and np.any(_are_nan(None, [jnp.asarray(score)])):
        raise ValueError(f"scores must be numbers, but {name} has a NaN")


def all_numbers(argument: str, net: Network, arrays: list[Array], cause: str = "") -> None:
    """Checks that the layers' arrays have no NaN."""
    groups = groups_of(net, arrays)
    found = jax.device_get([_are_nan(group.owner, group.of(arrays)) for group in groups])
    for layer, n_nan in zip(net.layers, in_order(groups, found), strict=True):
        if n_nan:
            raise ValueError(f"{argument} must be numbers, but {layer.name} has a NaN{cause}")


def not_diverged(net: Network, scores: list[Array]) -> None:
    """Checks that the scores which a method found have no NaN."""
    all_numbers("scores of method", net, scores, ": its optimizer diverged")


@meshes.program(layers=lambda arrays: arrays, by_numpy=lambda: Quick(_are_nan_by_numpy))
def _are_nan(_: Network | None, arrays: list[Array]) -> Array:
    """The number of NaN entries in each array."""
    return counts_of([x.astype(jnp.float32) for x in arrays], are_small(arrays), jnp.isnan)


def _are_nan_by_numpy(arrays: list[np.ndarray]) -> np.ndarray:
    return np.asarray([np.count_nonzero(np.isnan(x)) for x in arrays], np.uint32)


def parallel_masks(tree: PyTree, masks: PyTree) -> None:
    """Checks that boolean masks fit the parameters, or a tree parallel to them."""
    named, treedef = named_leaves(tree)
    check_structure(masks, treedef, "masks", "params")
    for (name, leaf), mask in zip(named, treedef.flatten_up_to(masks), strict=True):
        boolean(name, mask)
        if jnp.ndim(mask) and jnp.shape(mask) != jnp.shape(leaf):
            raise ValueError(
                f"masks must have shape {jnp.shape(leaf)} at {name}, got {jnp.shape(mask)}"
            )


def boolean(name: str, mask: Any) -> None:
    """Checks that a mask is boolean."""
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"masks must be boolean, but {name} is {jnp.result_type(mask)}")


def _is_traced(array: Any) -> bool:
    return isinstance(array, jax.core.Tracer)

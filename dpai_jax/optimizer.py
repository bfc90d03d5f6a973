"""The optimizer of sparse training: pruned weights stay exactly zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpai_jax import checks
from dpai_jax.masks import apply_masks, masked
from dpai_jax.tools.trees import like_by_name, named_leaves

PyTree = Any


def keep_pruned(
    optimizer: optax.GradientTransformation, masks: PyTree
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under which pruned weights are exactly zero after every update.

    Gradients of pruned weights are zeroed before the inner optimizer sees them, and its updates
    after: momentum, weight decay or orthogonalisation may bring them back in between. Parts of its
    state that are parallel to the parameters, such as moments, are zero there too. An update moves
    a pruned weight to zero even if it was not zero before; a NaN alone cannot be moved.

    Masks fit trees by the names of the leaves: those of Flax NNX, whose optimizer hands over
    variables at one time and arrays at another, need no conversion.

    Example:
      >>> import jax, jax.numpy as jnp, optax, dpai_jax as dpai
      >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
      >>> masks = {"kernel": jnp.array([[True, False]])}
      >>> tx = dpai.keep_pruned(optax.adamw(0.1), masks)
      >>> params = dpai.apply_masks(params, masks)
      >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()[0][1]
      0.0

    Args:
      optimizer: any optax optimizer.
      masks: pytree of boolean masks parallel to the parameters.

    Returns:
      The wrapped optimizer. Its state is that of the inner one.

    Raises:
      TypeError: if `optimizer` is not an optax optimizer, or a mask not boolean.
      ValueError: from `init` and `update`, if masks and parameters do not fit, or `update` is
        called without `params`.
    """
    checks.optimizer("optimizer", optimizer)
    if hasattr(masks, "masks"):
        raise TypeError("masks must be a pytree of boolean masks, got a Result: pass its .masks")
    for name, mask in named_leaves(masks)[0]:
        checks.boolean(name, mask)
    inner = optax.with_extra_args_support(optimizer)

    def mask_state(state: Any, like: PyTree, fitting: PyTree) -> Any:
        structure: Any = jax.tree.structure(like)

        def is_parallel(node: Any) -> bool:
            return jax.tree.structure(node, is_leaf=_is_left_out) == structure

        def mask_part(node: Any) -> Any:
            if not is_parallel(node):
                return node
            return jax.tree.map(_masked_moment, node, fitting, is_leaf=_is_left_out)

        return jax.tree.map(mask_part, state, is_leaf=is_parallel)

    def init(params: PyTree) -> Any:
        fitting = like_by_name(masks, params, "masks", "params")
        return mask_state(inner.init(apply_masks(params, fitting)), params, fitting)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("params must be given to update: call update(updates, state, params)")
        for_params = like_by_name(masks, params, "masks", "params")
        fitting = like_by_name(masks, updates, "masks", "updates")
        kept = apply_masks(params, for_params)
        updates, state = inner.update(apply_masks(updates, fitting), state, kept, **extra)
        leaves = jax.tree.leaves(updates)
        structure: Any = jax.tree.structure(updates)
        triples = zip(leaves, jax.tree.leaves(params), jax.tree.leaves(for_params), strict=True)
        moved = structure.unflatten([_to_zero(*triple) for triple in triples])
        return moved, mask_state(state, updates, fitting)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_left_out(node: Any) -> bool:
    """Whether a node of a state stands for a parameter that another optimizer updates."""
    return isinstance(node, optax.MaskedNode)


def _masked_moment(moment: Any, mask: Any) -> Any:
    """A part of the state, masked if it has one number for each weight."""
    if _is_left_out(moment) or jnp.shape(moment) != jnp.shape(mask):
        return moment
    return masked(moment, mask)


def _to_zero(update: Any, param: Any, mask: Any) -> Any:
    """The update, but for pruned weights the one that moves them to zero."""
    if jnp.ndim(mask) == 0:
        return update
    # In bfloat16 the negative of a float32 weight would be rounded.
    dtype = jnp.promote_types(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))

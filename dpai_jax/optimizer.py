"""The optimiser of sparse training: pruned weights stay exactly zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dpai_jax.masks import apply_masks, masked

PyTree = Any


def keep_pruned(
    optimizer: optax.GradientTransformation, masks: PyTree
) -> optax.GradientTransformationExtraArgs:
    """An optimiser under which pruned weights are exactly zero after every update.

    Gradients of pruned weights are zeroed before the inner optimiser sees them, and its updates
    after: momentum, weight decay or orthogonalisation may bring them back in between. Parts of its
    state that are parallel to the parameters, such as moments, are zero there too. An update moves
    a pruned weight to zero even if it was not zero before.

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
      optimizer: any optax optimiser.
      masks: pytree of boolean masks parallel to the parameters.

    Returns:
      The wrapped optimiser. Its state is that of the inner one.

    Raises:
      ValueError: from `init` and `update`, if masks and parameters do not fit.
      TypeError: if a mask is not boolean.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    structure: Any = jax.tree.structure(masks)

    def is_parallel(node: Any) -> bool:
        return jax.tree.structure(node, is_leaf=_is_left_out) == structure

    def mask_state(state: Any) -> Any:
        return jax.tree.map(
            lambda node: (
                jax.tree.map(_masked_moment, node, masks, is_leaf=_is_left_out)
                if is_parallel(node)
                else node
            ),
            state,
            is_leaf=is_parallel,
        )

    def init(params: PyTree) -> Any:
        return mask_state(optimizer.init(apply_masks(params, masks)))

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        gradients = apply_masks(updates, masks)
        kept = None if params is None else apply_masks(params, masks)
        updates, state = optimizer.update(gradients, state, kept, **extra)
        if params is None:
            updates = apply_masks(updates, masks)
        else:
            updates = jax.tree.map(_to_zero, updates, params, masks)
        return updates, mask_state(state)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_left_out(node: Any) -> bool:
    """Whether a node of a state stands for a parameter that the optimiser leaves to another."""
    return isinstance(node, optax.MaskedNode)


def _masked_moment(moment: Any, mask: Any) -> Any:
    """A part of the state, masked where it has a number for each weight."""
    if _is_left_out(moment) or jnp.shape(moment) != jnp.shape(mask):
        return moment
    return masked(moment, mask)


def _to_zero(update: Any, param: Any, mask: Any) -> Any:
    """The update with, for pruned weights, the one that ends at zero."""
    if jnp.ndim(mask) == 0:
        return update
    # In bfloat16 the negative of a float32 weight would not be its negative.
    dtype = jnp.promote_types(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))

"""Networks of every library, cut at random: outputs and gradients are those of the masked ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai
from dpai_jax.tools.trees import named_leaves
from tests.support.networks import by_name

# Residual sums with batch norm in training, depthwise convolutions with gates, attention with
# grouped heads, a concatenation, one with a loop, a reshape that also permutes.
NETWORKS = (
    "linen/resnet_training",
    "linen/efficientnet",
    "nnx/film",
    "haiku/densenet",
    "equinox/tied_decoder",
    "plain/convolution_ensemble",
    "plain/grouped_query_decoder",
    "plain/scanned_layers",
)


def channel_masks(params: Any, layers: frozenset[str], seed: int) -> Any:
    """Masks with dead channels along every axis, and weights that die one by one."""
    rng = np.random.default_rng(seed)
    named, treedef = named_leaves(params)
    masks = []
    for name, leaf in named:
        mask = rng.random(leaf.shape) < 0.6
        for axis, size in enumerate(leaf.shape):
            if size > 3:
                mask = np.moveaxis(np.moveaxis(mask, axis, -1) & (rng.random(size) < 0.6), -1, axis)
        mask.reshape(-1)[:1] = True
        masks.append(jnp.asarray(mask if name in layers else True))
    return treedef.unflatten(masks)


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_networks_give_the_masked_outputs_and_gradients(name: str) -> None:
    case = by_name(name)
    fn, params, x = case.make()
    masks = channel_masks(params, case.layers, 0)
    small = dpai.compact(fn, params, masks, x)
    assert small.after.weights < small.before.weights

    def differentiated(fn: Any) -> Any:
        def loss(params: Any) -> Any:
            outputs = fn(params, x)
            sums = [jnp.sum(jnp.sin(y.astype(jnp.float32) + 0.3)) for y in jax.tree.leaves(outputs)]
            return jnp.sum(jnp.stack(sums)), outputs

        return jax.jit(jax.grad(loss, has_aux=True, allow_int=True))

    # Bfloat16 has eight bits; gradients in it may differ by a few units of the last one.
    rounding = 2**-6 if "bf16" in str(jax.make_jaxpr(fn)(params, x)) else 1e-3
    gradient, outputs = differentiated(fn)(dpai.apply_masks(params, masks))
    small_gradient, small_outputs = differentiated(small.fn)(small.params)
    for y, small_y in zip(jax.tree.leaves(outputs), jax.tree.leaves(small_outputs), strict=True):
        np.testing.assert_allclose(small_y, y, 1e-4, 1e-5)
    leaves = (small.leaves, *map(jax.tree.leaves, (small.masks, gradient, small_gradient)))
    for leaf, mask, g, small_g in zip(*leaves, strict=True):
        if g.dtype != jax.dtypes.float0:
            for axis, k in enumerate(leaf.kept):
                g = g if k is None else g.take(k, axis)
            largest = float(jnp.max(jnp.abs(g), initial=1e-3))
            difference = jnp.where(mask, g - small_g, 0)
            np.testing.assert_allclose(difference / largest, 0, atol=rounding, err_msg=leaf.name)

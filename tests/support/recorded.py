"""Every method on three networks at three sparsities: the cases whose masks are recorded.

`recorded_masks.npz` holds one row of packed bits for each case, made by commit 753ecab. One device
and a mesh of eight gave the same bits. What was the default of DPaI then is "dpai plain" now; the
rows of "dpai" are today's default. Those of "dpai erk" are the default before it, bit by bit on the
MLP and the transformer; on the network with grouped features they were recorded anew, since its
balance takes a layer's share of all paths in place of a feature's. NPB on the transformer was
recorded anew since its paths are counted in one evaluation, and rounding does not decide between
equal numbers of them; NTK-SAP, since its normal numbers are drawn for all layers at once; "dpai
repaired" at 0.97, since a repair completes a path layer by layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

import dpai_jax as dpai
from tests.support import sharded

NETWORKS = ("mlp", "residual", "transformer")
SPARSITIES = (0.5, 0.9, 0.97)
WITH_DATA = ("snip", "iterative snip", "force", "grasp", "prospr")

# XLA's partitioner crashes on the gradient of a grouped convolution whose kernel is sharded.
WITH_GRADIENTS = (*WITH_DATA, "ntksap", "imp", "synflow")


def mesh_of(network: str, method: str) -> str:
    """The mesh of eight devices that a method is recorded on."""
    return "data" if network == "residual" and method in WITH_GRADIENTS else "mixed"


def loss_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    def loss_fn(params: Any, batch: Any) -> Any:
        x, y = batch
        return jnp.mean(jnp.square(jnp.tanh(fn(params, x)) - y))

    return loss_fn


def batches_of(shape: tuple[int, ...], outputs: int) -> list[Any]:
    rng = np.random.default_rng(7)

    def draw(*sizes: int) -> np.ndarray:
        return rng.standard_normal(sizes).astype(np.float32)

    return [(draw(4, *shape[1:]), draw(4, outputs)) for _ in range(2)]


def trained(loss_fn: Callable[..., Any], batch: Any) -> Callable[..., Any]:
    gradient = jax.jit(jax.grad(loss_fn))

    def train(params: Any, masks: Any) -> Any:
        for _ in range(2):
            gradients = gradient(params, batch)
            params = jax.tree.map(lambda p, g, m: (p - 0.01 * g) * m, params, gradients, masks)
        return params

    return train


def plain(**settings: Any) -> dpai.DPaI:
    """A plain ascent at a constant density by the paper's indicators."""
    defaults = {"counting": "mean_field", "optimizer": optax.sgd(0.01), "normalize": True}
    return dpai.DPaI.published(**defaults | settings)


def methods(loss_fn: Callable[..., Any], batch: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each method and the further arguments of its call of `prune`."""
    return {
        "dpai": (dpai.DPaI(), {}),
        "dpai erk": (dpai.DPaI(allocation=dpai.erk), {}),
        "dpai plain": (plain(steps=30), {}),
        "dpai exact": (plain(steps=12, counting="exact", alpha=0.5, gamma=3.0), {}),
        "dpai repaired": (plain(steps=12), {"repair": True}),
        "random": (dpai.Random(), {}),
        "random repaired": (dpai.Random(), {"repair": True}),
        "magnitude": (dpai.Magnitude(), {}),
        "snip": (dpai.SNIP(), {}),
        "iterative snip": (dpai.IterativeSNIP(steps=5), {}),
        "force": (dpai.FORCE(steps=5), {}),
        "grasp": (dpai.GraSP(), {}),
        "synflow": (dpai.SynFlow(steps=10), {}),
        "phew": (dpai.PHEW(), {}),
        "npb": (dpai.NPB(), {}),
        "ntksap": (dpai.NTKSAP(steps=3), {}),
        "prospr": (dpai.ProsPr(), {}),
        "imp": (dpai.IMP(trained(loss_fn, batch)), {}),
    }


METHODS = tuple(methods(jnp.sum, None))


def scaled(params: Any) -> Any:
    """Kernels of unit gain, so that all layers take part in the loss."""

    def scale(leaf: np.ndarray) -> np.ndarray:
        fan_in = np.prod(leaf.shape[-2:-1]) * (9 if leaf.ndim == 4 else 1)
        return leaf / np.float32(np.sqrt(fan_in)) if leaf.ndim >= 2 else leaf

    return jax.tree.map(scale, params)


def row(masks: Any) -> np.ndarray:
    """All masks as one packed row of bits."""
    flat = [np.asarray(m).ravel() for m in jax.tree.leaves(masks) if np.ndim(m)]
    return np.packbits(np.concatenate(flat))


def masks_of(network: str, method: str, sparsity: float, devices: int) -> np.ndarray:
    """The masks of one prune, as a packed row."""
    fn, params, x = sharded.network(network)
    params = scaled(params)
    outputs = jax.eval_shape(fn, params, x).shape[-1]
    loss_fn, batches = loss_of(fn), batches_of(x.shape, outputs)
    how, arguments = methods(loss_fn, batches[0])[method]
    if isinstance(how, dpai.DPaI) and how.schedule == "constant" and sparsity == 0.5:
        how = dataclasses.replace(how, steps=11)  # those recorded ended early there
    if method in WITH_DATA:
        arguments = arguments | {"loss_fn": loss_fn, "batches": batches}
    if devices > 1:
        mesh = sharded.mesh(mesh_of(network, method), AxisType.Auto)
        params = sharded.spread(params, mesh)
    else:
        params = jax.tree.map(jnp.asarray, params)
    result = dpai.prune(
        fn, params, x, sparsity, method=how, key=jax.random.key(3), progress=False, **arguments
    )
    return row(result.masks)

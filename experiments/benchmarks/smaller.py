"""What pruning saves at run time: networks without their dead channels, and sparse products."""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental import sparse as jax_sparse

import dpai_jax as dpai
from experiments import models
from experiments.benchmarks import clock, networks
from experiments.benchmarks.networks import Network
from experiments.benchmarks.rows import Jobs, Row, isolated

METHODS: dict[str, dpai.Method] = {
    "DPaI": dpai.DPaI(),
    "SynFlow": dpai.SynFlow(),
    "magnitude": dpai.Magnitude(),
}
"""The methods whose masks are cut."""

BATCH = 32
"""Inputs of a timed call."""

MATRICES = ((784, 300), (1024, 1024), (4096, 4096))
"""Shapes of matrices whose products are timed."""

FORMATS = ("dense", "BCOO", "BCSR", "SciPy CSR")
"""How a matrix is held."""


def compact() -> Jobs:
    """The size and the forward pass of networks, masked and without their dead channels."""
    for network in networks.COMPACT:
        for name in METHODS:
            title = f"{network.title}, {name}"
            yield title, functools.partial(isolated, _compact, network, name)


def sparse() -> Jobs:
    """A batch times a sparse matrix, in the formats of `jax.experimental.sparse` and of SciPy."""
    for shape in MATRICES:
        title = " × ".join(map(str, shape))
        yield title, functools.partial(isolated, _sparse, shape)


def _compact(network: Network, name: str) -> Row:
    model = models.create(network.model, network.classes, network.width)
    model = model if network.depth is None else model.clone(depth=network.depth)
    _, _, x = network.problem()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(x.shape, x.dtype))
    batch = jnp.zeros((BATCH, *network.shape), x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating):
        batch = jax.random.normal(jax.random.key(1), batch.shape, x.dtype)

    def seconds(fn: Any, params: Any) -> dict[str, float]:
        return clock.call_seconds(functools.partial(jax.jit(fn), params, batch))

    row: Row = {"network": network.title, "method": name, "seconds": seconds(model.apply, params)}
    row["at"] = []
    for sparsity in networks.SPARSITIES:
        result = dpai.prune(model.apply, params, x, sparsity, method=METHODS[name], progress=False)
        small = dpai.compact(model.apply, params, result.masks, x)
        sizes = {
            f"{field} {when}": getattr(size, field)
            for when, size in (("before", small.before), ("after", small.after))
            for field in ("weights", "bytes", "multiply_adds")
        }
        own = {"sparsity": sparsity, "remarks": len(small.remarks)}
        row["at"].append(own | sizes | {"seconds": seconds(small.fn, small.params)})
    return row


def _sparse(shape: tuple[int, int]) -> Row:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(shape).astype(np.float32)
    x = rng.standard_normal((BATCH, shape[0])).astype(np.float32)
    row: Row = {"at": []}
    for sparsity in networks.SPARSITIES:
        matrix = jnp.asarray(np.where(rng.random(shape) < sparsity, 0, weights).T)
        held = {
            "dense": matrix,
            "BCOO": jax_sparse.BCOO.fromdense(matrix),
            "BCSR": jax_sparse.BCSR.fromdense(matrix),
        }
        product = jax.jit(lambda w, x: w @ x.T)
        calls = {name: functools.partial(product, w, x) for name, w in held.items()}
        calls["SciPy CSR"] = functools.partial(
            operator.matmul, scipy.sparse.csr_array(np.asarray(matrix)), x.T
        )
        times = {name: clock.call_seconds(calls[name]) for name in FORMATS}
        row["at"].append({"sparsity": sparsity, **times})
    return row

"""Networks written for one device of a mesh (`jax.shard_map`), against the same without a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import dpai_jax as dpai
from dpai_jax.paths.rewriting import called_jaxpr
from tests.support.reference import random_masks

Params = dict[str, jax.Array]

# Tracing needs no devices, so a mesh of names and sizes does.
MESH = AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
SHAPES = {"first": (3, 8), "second": (8, 8), "third": (8, 4), "experts": (4, 4, 6)}
X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)), jnp.float32)


def per_device(body: Callable[..., Any], specs: dict[str, P]) -> Callable[..., Any]:
    """The body as a network on whole arrays, with and without types that vary over the mesh."""

    def fn(params: Params, x: jax.Array, check_vma: bool = True) -> jax.Array:
        mapped = jax.shard_map(
            body,
            mesh=MESH,
            in_specs=(specs, P("data")),
            out_specs=P("data"),
            check_vma=check_vma,
        )
        return mapped({name: params[name] for name in specs}, x)

    return fn


def tensor_parallel(p: Params, x: jax.Array) -> jax.Array:
    """Columns of the first kernel and rows of the second on each device."""
    return jax.nn.relu(lax.psum(jax.nn.relu(x @ p["first"]) @ p["second"], "model")) @ p["third"]


def plain_mlp(p: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(jax.nn.relu(x @ p["first"]) @ p["second"]) @ p["third"]


def gathered(p: Params, x: jax.Array) -> jax.Array:
    """Every kernel is split over all devices, and gathered before use."""
    kernels = {
        name: lax.all_gather(leaf, ("data", "model"), axis=1 if name == "first" else 0, tiled=True)
        for name, leaf in p.items()
    }
    return plain_mlp(kernels, x)


def scattered(p: Params, x: jax.Array) -> jax.Array:
    """As tensor_parallel, with the sum scattered over the features that the last kernel reads."""
    hidden = jax.nn.relu(x @ p["first"]) @ p["second"]
    hidden = lax.psum_scatter(hidden, "model", scatter_dimension=1, tiled=True)
    return lax.psum(jax.nn.relu(hidden) @ p["third"], "model")


def normalised(p: Params, x: jax.Array) -> jax.Array:
    """Statistics over the batch of all devices."""
    hidden = x @ p["first"]
    mean = lax.pmean(hidden.mean(0, keepdims=True), "data")
    variance = lax.pmean(jnp.square(hidden - mean).mean(0, keepdims=True), "data")
    return jax.nn.relu((hidden - mean) * lax.rsqrt(variance + 1e-3)) @ p["second"]


def plain_normalised(p: Params, x: jax.Array) -> jax.Array:
    hidden = x @ p["first"]
    mean, variance = (f(hidden, axis=0, keepdims=True) for f in (jnp.mean, jnp.var))
    return jax.nn.relu((hidden - mean) * lax.rsqrt(variance + 1e-3)) @ p["second"]


def shifted(p: Params, x: jax.Array) -> jax.Array:
    """Rows handed from device to device; each device adds its number."""
    after = lax.ppermute(x @ p["first"], "data", [(0, 1), (1, 0)])
    return jax.nn.relu(after + lax.axis_index("data").astype(float)) @ p["second"]


def plain_shifted(p: Params, x: jax.Array) -> jax.Array:
    after = jnp.roll(x @ p["first"], 4, axis=0) + (jnp.arange(8) >= 4)[:, None].astype(float)
    return jax.nn.relu(after) @ p["second"]


def looped(p: Params, x: jax.Array) -> jax.Array:
    """A sum over devices in each step of a scan."""

    def step(h: jax.Array, _: None) -> tuple[jax.Array, None]:
        return lax.psum(jax.nn.relu(h @ p["first"]) @ p["second"], "model")[:, :3], None

    return lax.scan(step, x, None, 2)[0]


def plain_looped(p: Params, x: jax.Array) -> jax.Array:
    for _ in range(2):
        x = (jax.nn.relu(x @ p["first"]) @ p["second"])[:, :3]
    return x


def experts(p: Params, x: jax.Array) -> jax.Array:
    """One expert on each device along "model"; tokens are sent to their device and back."""
    hidden = x @ p["first"]
    slots = hidden.reshape(4, 1, 8)[..., :4]
    arrived = lax.all_to_all(slots, "model", 0, 1, tiled=True)
    back = jnp.einsum("etd,edf->etf", arrived, p["experts"])
    return lax.all_to_all(back, "model", 1, 0, tiled=True)[:, 0]


def plain_experts(p: Params, x: jax.Array) -> jax.Array:
    """Row i of each device's four is always the one that is sent to expert i."""
    slots = (x @ p["first"]).reshape(2, 4, 8)[..., :4]
    return jnp.einsum("etd,tdf->etf", slots, p["experts"]).reshape(8, 6)


COLUMNS, ROWS = P(None, "model"), P("model")
NETWORKS: dict[str, tuple[Any, Any]] = {
    "tensor parallel": (
        per_device(tensor_parallel, {"first": COLUMNS, "second": ROWS, "third": P()}),
        plain_mlp,
    ),
    "gathered": (
        per_device(
            gathered,
            {
                "first": P(None, ("data", "model")),
                "second": P(("data", "model")),
                "third": P(("data", "model")),
            },
        ),
        plain_mlp,
    ),
    "scattered": (
        per_device(scattered, {"first": COLUMNS, "second": ROWS, "third": ROWS}),
        plain_mlp,
    ),
    "normalised": (per_device(normalised, {"first": P(), "second": P()}), plain_normalised),
    "shifted": (per_device(shifted, {"first": P(), "second": P()}), plain_shifted),
    "looped": (per_device(looped, {"first": COLUMNS, "second": ROWS}), plain_looped),
    "experts": (per_device(experts, {"first": P(), "experts": P("model")}), plain_experts),
}


def parameters() -> Params:
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in SHAPES.items()}


# Without the types of varying values JAX can't tell what is replicated; some of these need them.
CASES = [(name, check) for name in NETWORKS for check in (True, False) if check or name != "looped"]


def network_of(name: str, check: bool) -> Callable[[Params, jax.Array], jax.Array]:
    return functools.partial(NETWORKS[name][0], check_vma=check)


def needs_replicated(name: str, check: bool) -> bool:
    """Whether JAX takes an output of a gather for one that differs between devices."""
    return check and name in ("gathered", "scattered", "experts")


@pytest.mark.parametrize(("name", "check"), [c for c in CASES if not needs_replicated(*c)])
def test_the_program_of_a_device_is_mapped_to_whole_arrays(name: str, check: bool) -> None:
    """The rewritten program computes what the network without a mesh does."""
    params = parameters()
    jaxpr = jax.make_jaxpr(network_of(name, check))(params, X)
    (eqn,) = (eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "shard_map")
    leaves = dict(zip(jaxpr.jaxpr.invars, jax.tree.leaves((params, X)), strict=True))
    (result,) = jaxpr_as_fun(called_jaxpr(eqn))(*(leaves[var] for var in eqn.invars))
    np.testing.assert_allclose(result, NETWORKS[name][1](params, X), 1e-4, 1e-5)


@pytest.mark.parametrize(("name", "check"), [c for c in CASES if not needs_replicated(*c)])
def test_a_network_written_per_device_counts_as_the_whole(name: str, check: bool) -> None:
    params = parameters()
    net, whole = (dpai.trace(fn, params, X) for fn in (network_of(name, check), NETWORKS[name][1]))
    assert net.layers == whole.layers
    shapes = {layer.name: layer.shape for layer in net.layers}
    masks = random_masks(shapes, 0.5, np.random.default_rng(2))
    leaves = [jnp.asarray(masks[layer.name], jnp.float32) for layer in net.layers]
    values, slopes = zip(
        *(jax.value_and_grad(n.log_count)(leaves) for n in (net, whole)), strict=True
    )
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-6)
    for a, b in zip(*slopes, strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-8)
    for a, b in zip(net.reached(leaves), whole.reached(leaves), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "method", [dpai.DPaI(steps=3), dpai.SynFlow(steps=3), dpai.PHEW(), dpai.NPB()]
)
def test_methods_prune_a_network_written_per_device(method: dpai.Method) -> None:
    fn, _ = NETWORKS["tensor parallel"]
    params = {name: parameters()[name] for name in ("first", "second", "third")}
    result = dpai.prune(fn, params, X, 0.5, method=method, progress=False)
    assert result.topology.weights == 60
    assert result.topology.effective > 40

"""Small networks with a loss and batches, for the tests of methods."""

import itertools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import dpai_jax as dpai


class Problem(NamedTuple):
    """What `dpai_jax.prune` takes, and the number of prunable weights."""

    fn: Any
    params: Any
    x: Any
    loss_fn: Any
    batches: Any
    size: int


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def mlp(params: Any, x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["first"] + params["bias"][None])
    return jnp.tanh(hidden @ params["second"]) @ params["last"]


def mlp_params(sizes: tuple[int, ...] = (5, 7, 6, 3), seed: int = 0) -> dict[str, jax.Array]:
    names = ("first", "second", "last")
    pairs = itertools.pairwise(sizes)
    params = {
        name: draw(pair, seed + i) / np.float32(np.sqrt(pair[0]))
        for i, (name, pair) in enumerate(zip(names, pairs, strict=True))
    }
    return params | {"bias": jnp.full((sizes[1],), 0.1)}


def squared_error(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    return jnp.mean(jnp.square(mlp(params, x) - y))


def mlp_batches(number: int = 1, rows: int = 8) -> list[tuple[jax.Array, jax.Array]]:
    return [(draw((rows, 5), 10 + i), draw((rows, 3), 20 + i)) for i in range(number)]


def cross_entropy(fn: Any) -> Any:
    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, labels = batch
        losses = optax.softmax_cross_entropy_with_integer_labels(fn(params, x), labels)
        return losses.mean()

    return loss_fn


def _problem(fn: Any, params: Any, shape: tuple[int, ...]) -> Problem:
    batches = [(draw((6, *shape), i), jnp.arange(6, dtype=jnp.int32) % 3) for i in range(2)]
    net = dpai.trace(fn, params, batches[0][0])
    return Problem(fn, params, batches[0][0], cross_entropy(fn), batches, net.size)


class _Residual(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(6, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = x + nn.Conv(6, (3, 3))(y)
        return nn.Dense(3)(nn.relu(x).mean((1, 2)))


def linen() -> Problem:
    model = _Residual()
    return _problem(model.apply, model.init(jax.random.key(0), jnp.ones((1, 6, 6, 2))), (6, 6, 2))


class _Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.norm(self.hidden(x))))


def flax_nnx() -> Problem:
    graphdef, params = nnx.split(_Classifier(nnx.Rngs(0)))
    return _problem(lambda params, x: nnx.merge(graphdef, params)(x), params, (6,))


def equinox() -> Problem:
    model = eqx.nn.MLP(6, 3, 12, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return _problem(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params, (6,))


def scanned() -> Problem:
    """Layers stacked in one kernel."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(
            lambda x, w: (x + jax.nn.relu(x @ w), None), x @ params["stem"], params["blocks"]
        )
        return x @ params["head"]

    shapes = {"stem": (6, 8), "blocks": (3, 8, 8), "head": (8, 3)}
    params = {name: draw(shape, i) / 3 for i, (name, shape) in enumerate(shapes.items())}
    return _problem(fn, params, (6,))

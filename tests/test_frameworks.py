"""Training under masks in each framework's own way: pruned weights are exactly zero."""

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

import dpai_jax as dpai

pytestmark = pytest.mark.standard_promotion

X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 12)), jnp.float32)
STEPS = 20


def tx(masks: Any) -> optax.GradientTransformation:
    return dpai.keep_pruned(optax.adamw(1e-2, weight_decay=0.1), masks)


def assert_pruned(params: Any, masks: Any) -> None:
    """Nothing but zeros where the masks are false; the rest has moved."""
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True))
    pruned = [np.asarray(p)[~np.asarray(m)] for p, m in pairs if np.ndim(m)]
    assert sum(p.size for p in pruned) > 0
    assert not any(p.any() for p in pruned)


class Module(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(12, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.drop(nnx.relu(self.norm(self.hidden(x)))))


def test_flax_nnx_with_its_own_optimizer_under_its_jit() -> None:
    model = Module(nnx.Rngs(0))
    fn, params = dpai.from_nnx(model)
    result = dpai.prune(fn, params, X, sparsity=0.8, progress=False)
    nnx.update(model, dpai.apply_masks(params, result.masks))
    optimizer = nnx.Optimizer(model, tx(result.masks), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        gradients = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
        optimizer.update(model, gradients)

    before = np.asarray(model.hidden.bias[...])
    for _ in range(STEPS):
        step(model, optimizer)
    assert result.topology.weights == round(0.2 * (12 * 16 + 16 * 4))
    assert np.any(np.asarray(model.hidden.bias[...]) != before)
    assert_pruned(nnx.state(model, nnx.Param), result.masks)


def test_an_nnx_module_is_left_as_it_is_and_evaluated_without_noise() -> None:
    model = Module(nnx.Rngs(0))
    fn, params = dpai.from_nnx(model)
    np.testing.assert_array_equal(fn(params, X), fn(params, X))
    model.train()
    assert np.any(np.asarray(model(X)) != np.asarray(model(X)))


def test_flax_linen_with_a_train_state() -> None:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(16)(x))
            return nn.Dense(4)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))

    model = Network()
    variables = model.init(jax.random.key(0), X)
    rest = {"batch_stats": variables["batch_stats"]}
    result = dpai.prune(
        lambda params, x: model.apply({"params": params, **rest}, x), variables["params"], X,
        sparsity=0.8, progress=False,
    )  # fmt: skip
    params = dpai.apply_masks(variables["params"], result.masks)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx(result.masks))

    @jax.jit
    def step(state: TrainState, key: jax.Array) -> TrainState:
        def loss(params: Any) -> jax.Array:
            output, _ = model.apply(
                {"params": params, **rest}, X, train=True, rngs={"dropout": key},
                mutable=["batch_stats"],
            )  # fmt: skip
            return jnp.mean(output**2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for i in range(STEPS):
        state = step(state, jax.random.key(i))
    assert_pruned(state.params, result.masks)


def train(fn: Any, params: Any) -> None:
    result = dpai.prune(fn, params, X, sparsity=0.8, progress=False)
    params, optimizer = dpai.apply_masks(params, result.masks), tx(result.masks)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradients = jax.grad(lambda params: jnp.mean(fn(params, X) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    assert_pruned(params, result.masks)


def test_equinox() -> None:
    model = eqx.nn.MLP(12, 4, 16, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    train(lambda params, x: jax.vmap(eqx.combine(params, static))(x), params)


def test_haiku() -> None:
    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4])(x)))
    train(network.apply, network.init(jax.random.key(0), X))

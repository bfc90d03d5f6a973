"""Networks looked at without computing them, so at any size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

import dpai_jax as dpai


def images(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def tokens(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@functools.lru_cache
def variables(model, x):
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)


def shapes(model, x):
    """The shapes of the parameters by their path, such as "head/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(variables(model, x)["params"])
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}


def size(shapes_by_name):
    return sum(map(math.prod, shapes_by_name.values()))


def kernels(model, x):
    """The shapes of the kernels by their path."""
    return {name: shape for name, shape in shapes(model, x).items() if name.endswith("kernel")}


def trace(model, x):
    return dpai.trace(model.apply, variables(model, x), x)


def outputs(model, x):
    """What each module returns, by the module's path."""

    def fn(values, x):
        return model.apply(values, x, capture_intermediates=True, mutable="intermediates")[1]

    captured = jax.eval_shape(fn, variables(model, x), x)["intermediates"]
    leaves = jax.tree_util.tree_leaves_with_path(captured)
    # A path ends in the method's name and the number of the call.
    return {"/".join(key.key for key in path[:-2]): leaf for path, leaf in leaves}


def initial(model, x, *names):
    """The named parameters as initialized; no other is computed."""

    def fn(key):
        params = model.init(key, jnp.zeros(x.shape, x.dtype))["params"]
        return [
            functools.reduce(lambda tree, part: tree[part], n.split("/"), params) for n in names
        ]

    # The default generator compiles much slower.
    return [np.asarray(leaf) for leaf in jax.jit(fn)(jax.random.key(0, impl="rbg"))]


def assert_deviates(weights, deviation):
    """Checks the mean and standard deviation of random weights to five standard errors."""
    assert abs(weights.mean()) < 5 * deviation / weights.size**0.5
    assert abs(weights.std() / deviation - 1) < 5 / (2 * weights.size) ** 0.5


def assert_normal(weights, deviation):
    """Checks the deviation, and that the tails of a normal distribution are not cut off."""
    assert_deviates(weights, deviation)
    assert np.mean(np.abs(weights) > 2.2 * deviation) > 0.01


def assert_uniform(weights, bound):
    """Checks that weights fill the interval up to a bound, and no more."""
    assert_deviates(weights, bound / 3**0.5)
    assert 0.98 * bound < np.abs(weights).max() <= bound * (1 + 1e-6)

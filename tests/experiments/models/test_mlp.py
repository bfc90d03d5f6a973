import math

import jax
import numpy as np
import pytest

from experiments import models
from tests.support import abstract


@pytest.mark.parametrize(("name", "layers"), [("mlp", 3), ("mlp2", 2), ("mlp8", 8)])
def test_depth_counts_the_layers_with_weights(name, layers):
    shapes = abstract.kernels(models.create(name, 10, 20), abstract.images(1, 28, 28, 1))
    assert sorted(shapes.values()) == sorted([(784, 20), *[(20, 20)] * (layers - 2), (20, 10)])


def test_it_is_layers_of_relu_and_a_linear_one():
    model = models.MLP(3, width=5, depth=4)
    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 1))
    variables = jax.jit(model.init)(jax.random.key(1, impl="rbg"), x)
    p = jax.tree.map(np.asarray, variables["params"])
    y = np.asarray(x).reshape(4, 6)
    for layer in (1, 2, 3):
        y = np.maximum(y @ p[f"hidden{layer}"]["kernel"], 0)
    expected = y @ p["head"]["kernel"]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-4, atol=1e-6)


def test_it_starts_at_he_normal_and_the_head_at_lecun_normal():
    x = abstract.images(1, 28, 28, 1)
    hidden, head = abstract.initial(models.MLP(100), x, "hidden1/kernel", "head/kernel")
    abstract.assert_deviates(hidden, math.sqrt(2 / 784))
    abstract.assert_deviates(head, math.sqrt(1 / 256))

import math

import jax
import numpy as np

from experiments import models
from tests.support import abstract

MNIST = abstract.images(1, 28, 28, 1)


def test_it_has_the_published_size_and_the_library_finds_all_kernels():
    model = models.create("lenet", 10)
    assert abstract.size(abstract.shapes(model, MNIST)) == 266_610
    net = abstract.trace(model, MNIST)
    assert [layer.shape for layer in net.layers] == [(784, 300), (300, 100), (100, 10)]
    assert net.size == 266_200


def test_the_second_layer_has_a_third_of_the_first_ones_features():
    shapes = abstract.kernels(models.create("lenet", 10, 20), MNIST)
    assert list(shapes.values()) == [(7, 10), (784, 20), (20, 7)]


def test_it_is_two_layers_of_relu_and_a_linear_one():
    model = models.LeNet(3, width=5)
    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 1))
    variables = jax.jit(model.init)(jax.random.key(1, impl="rbg"), x)
    p = jax.tree.map(np.asarray, variables["params"])
    y = np.asarray(x).reshape(4, 6)
    y = np.maximum(y @ p["hidden1"]["kernel"], 0)
    y = np.maximum(y @ p["hidden2"]["kernel"], 0)
    expected = y @ p["head"]["kernel"]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-4, atol=1e-6)


def test_it_starts_at_glorot_normal():
    names = ("hidden1/kernel", "hidden2/kernel", "head/kernel")
    kernels = abstract.initial(models.LeNet(10), MNIST, *names)
    for kernel in kernels:
        abstract.assert_deviates(kernel, math.sqrt(2 / sum(kernel.shape)))

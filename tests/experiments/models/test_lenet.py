import math

import jax
import numpy as np
import pytest

from experiments import models
from experiments.config import ConfigError
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


def test_lenet5_has_the_published_features_and_the_size_of_its_common_form():
    model = models.create("lenet5", 10)
    shapes = abstract.kernels(model, MNIST)
    # 25 taps of 1 and 6 channels, 5x5 features of 16 channels, 120 and 84: LeCun's figure 2.
    assert list(shapes.values()) == [
        (5, 5, 1, 6),
        (5, 5, 6, 16),
        (84, 10),
        (400, 120),
        (120, 84),
    ]
    assert abstract.size(abstract.shapes(model, MNIST)) == 61_706
    assert len(abstract.trace(model, MNIST).layers) == 5


def test_lenet5_widens_in_all_layers():
    shapes = abstract.kernels(models.create("lenet5", 3, 12), abstract.images(1, 12, 12, 3))
    assert shapes["conv2/kernel"] == (5, 5, 12, 32)
    assert shapes["hidden1/kernel"] == (32, 240)
    assert shapes["hidden2/kernel"] == (240, 168)


def test_lenet5_convolves_and_pools_as_written_out():
    model = models.LeNet5(3, width=2)
    x = jax.random.normal(jax.random.key(0), (2, 12, 14, 1))
    variables = jax.jit(model.init)(jax.random.key(1, impl="rbg"), x)
    p = jax.tree.map(np.asarray, variables["params"])

    def layer(y, kernel):
        windows = np.lib.stride_tricks.sliding_window_view(y, (5, 5), axis=(1, 2))
        y = np.maximum(np.einsum("nhwcij,ijco->nhwo", windows, kernel), 0)
        n, height, width, channels = y.shape
        pairs = y[:, : height // 2 * 2, : width // 2 * 2]
        return pairs.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))

    y = layer(np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0))), p["conv1"]["kernel"])
    y = layer(y, p["conv2"]["kernel"]).reshape(2, -1)
    for name in ("hidden1", "hidden2"):
        y = np.maximum(y @ p[name]["kernel"], 0)
    expected = y @ p["head"]["kernel"]
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_lenet5_refuses_images_without_room_for_its_convolutions():
    with pytest.raises(ConfigError, match=r"at least 12x12 for LeNet-5; got 8x8"):
        abstract.variables(models.LeNet5(10), abstract.images(1, 8, 8, 1))

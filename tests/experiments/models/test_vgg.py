import math

import pytest

from experiments import models
from experiments.config import ConfigError
from tests.support import abstract

CIFAR = abstract.images(1, 32, 32, 3)


@pytest.mark.parametrize(
    ("depth", "published", "convolutions"),
    [
        (11, 9_220_480, (1, 1, 2, 2, 2)),
        (13, 9_404_992, (2, 2, 2, 2, 2)),
        (16, 14_714_688, (2, 2, 3, 3, 3)),
        (19, 20_024_384, (2, 2, 4, 4, 4)),
    ],
)
def test_the_convolutions_have_the_published_size(depth, published, convolutions):
    kernels = abstract.kernels(models.create(f"vgg{depth}", 100), CIFAR)
    # What is published has biases, and no norms.
    biases = sum(n * c for n, c in zip(convolutions, (64, 128, 256, 512, 512), strict=True))
    assert abstract.size(kernels) == published - biases + 512 * 100
    assert len(kernels) == sum(convolutions) + 1


def test_the_library_finds_all_kernels_of_vgg19():
    net = abstract.trace(models.create("vgg19", 100), CIFAR)
    assert net.size == 20_070_080
    assert len(net.layers) == 17


def test_the_image_is_halved_between_stages_and_the_channels_double_up_to_eight_times():
    outputs = abstract.outputs(models.create("vgg16", 10, 4), CIFAR)
    for stage, (side, channels) in enumerate([(32, 4), (16, 8), (8, 16), (4, 32), (2, 32)], 1):
        assert outputs[f"stage{stage}_conv1"].shape == (1, side, side, channels)
        assert outputs[f"stage{stage}_conv2"].shape == (1, side, side, channels)
    assert outputs[""].shape == (1, 10)


def test_it_starts_as_torchvisions():
    model = models.VGG(num_classes=100, width=8, depth=11)
    kernel, head = abstract.initial(model, CIFAR, "stage4_conv1/kernel", "head/kernel")
    assert kernel.shape == (3, 3, 32, 64)
    abstract.assert_normal(kernel, math.sqrt(2 / (9 * 64)))
    abstract.assert_normal(head, 0.01)


def test_images_too_small_for_the_poolings_are_refused():
    abstract.variables(models.VGG(10, width=2), abstract.images(1, 16, 16, 1))
    with pytest.raises(ConfigError, match=r"images must be at least 16x16 .*; got 16x15"):
        abstract.variables(models.VGG(10, width=2), abstract.images(1, 16, 15, 1))


def test_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match=r"depth must be one of \[11, 13, 16, 19\]; got 12"):
        abstract.variables(models.VGG(10, depth=12), CIFAR)

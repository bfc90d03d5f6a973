import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models.resnet import BasicBlock
from tests.support import abstract

IMAGENET = abstract.images(1, 224, 224, 3)
CIFAR = abstract.images(1, 32, 32, 3)


def test_resnet20_has_the_published_number_of_prunable_weights():
    kernels = abstract.kernels(models.create("resnet20", 10), CIFAR)
    assert abstract.size(kernels) == 270_896
    # 19 convolutions of 3x3, two shortcuts and the head.
    assert len(kernels) == 22


@pytest.mark.parametrize(
    ("name", "published"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)]
)
def test_the_networks_for_small_images_have_the_published_size_and_two_shortcuts(name, published):
    # What is published has shortcuts without parameters.
    shortcuts = sum(width * 2 * width + 2 * 2 * width for width in (16, 32))
    assert abstract.size(abstract.shapes(models.create(name, 10), CIFAR)) == published + shortcuts


@pytest.mark.parametrize(
    ("depth", "published"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)]
)
def test_the_networks_for_imagenet_have_the_size_of_torchvisions(depth, published):
    model = models.create(f"resnet{depth}_imagenet", 1000)
    assert abstract.size(abstract.shapes(model, IMAGENET)) == published


@pytest.mark.parametrize(
    ("name", "classes", "x", "weights", "layers"),
    [
        ("resnet20", 10, CIFAR, 270_896, 22),
        ("resnet18", 200, abstract.images(1, 64, 64, 3), 11_261_632, 21),
        # Torchvision's 25,557,032 parameters without the norms' 53,120 and the head's biases.
        ("resnet50_imagenet", 1000, IMAGENET, 25_502_912, 54),
    ],
)
def test_the_library_finds_all_kernels(name, classes, x, weights, layers):
    net = abstract.trace(models.create(name, classes), x)
    assert net.size == weights
    assert len(net.layers) == layers


def test_stages_halve_the_image_and_double_the_channels():
    outputs = abstract.outputs(models.create("resnet20", 7, 4), abstract.images(2, 8, 8, 1))
    assert outputs[""].shape == (2, 7)
    for stage, shape in enumerate([(2, 8, 8, 4), (2, 4, 4, 8), (2, 2, 2, 16)], start=1):
        for block in (1, 2, 3):
            assert outputs[f"stage{stage}_block{block}"].shape == shape


@pytest.mark.parametrize(
    ("name", "x", "size", "expansion"),
    [
        ("resnet18", CIFAR, 32, 1),
        ("resnet50", CIFAR, 32, 4),
        ("resnet34_imagenet", IMAGENET, 56, 1),
        ("resnet50_imagenet", IMAGENET, 56, 4),
    ],
)
def test_the_stem_sets_the_image_that_the_stages_halve(name, x, size, expansion):
    outputs = abstract.outputs(models.create(name, 10), x)
    factor = 2 if name.endswith("imagenet") else 1
    assert outputs["stem"].shape == (1, factor * size, factor * size, 64)
    for stage in range(4):
        side, channels = size // 2**stage, 64 * 2**stage * expansion
        assert outputs[f"stage{stage + 1}_block1"].shape == (1, side, side, channels)
    assert "stage1_block4" not in outputs


def test_a_bottleneck_takes_its_step_in_the_middle():
    outputs = abstract.outputs(models.create("resnet50", 10, 4), CIFAR)
    sides = [outputs[f"stage2_block1/Conv_{index}"].shape[1] for index in range(3)]
    assert sides == [32, 16, 16]


@pytest.mark.parametrize(("depth", "layers"), [(8, 10), (20, 22), (56, 58)])
def test_depth_sets_the_number_of_layers(depth, layers):
    model = models.ResNet(num_classes=10, depth=depth)
    assert len(abstract.kernels(model, abstract.images(1, 8, 8, 1))) == layers


def test_small_images_networks_start_at_he_normal_by_fan_in():
    (kernel,) = abstract.initial(models.ResNet(10), CIFAR, "stage3_block1/Conv_0/kernel")
    assert kernel.shape == (3, 3, 32, 64)
    # Its tails are cut off, so that it deviates from its own deviation less than a normal one.
    abstract.assert_deviates(kernel, math.sqrt(2 / (9 * 32)))


def test_imagenets_networks_start_as_torchvisions():
    model = models.ImageNetResNet(num_classes=50, width=8, depth=50)
    names = ("stage4_block1/Conv_1", "stage4_block1/Conv_2", "stage4_block1/shortcut", "head")
    middle, last, shortcut, head = abstract.initial(model, CIFAR, *(f"{n}/kernel" for n in names))
    abstract.assert_normal(middle, math.sqrt(2 / (9 * 64)))
    abstract.assert_normal(last, math.sqrt(2 / 256))
    abstract.assert_normal(shortcut, math.sqrt(2 / 256))
    abstract.assert_uniform(head, 1 / math.sqrt(256))


def test_squeeze_and_excitation_adds_two_layers_to_each_block():
    plain, gated = (models.create(name, 10) for name in ("resnet20", "se_resnet20"))
    added = set(abstract.kernels(gated, CIFAR)) - set(abstract.kernels(plain, CIFAR))
    assert len(added) == 2 * 9
    # A quarter of the channels between them.
    weights = sum(3 * 2 * width * width // 4 for width in (16, 32, 64))
    assert abstract.size(abstract.kernels(gated, CIFAR)) == 270_896 + weights


def test_a_closed_gate_leaves_the_shortcut_alone():
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    conv = functools.partial(nn.Conv, use_bias=False)
    block = BasicBlock(conv, norm, 8, reduction=4)
    x = jax.random.uniform(jax.random.key(0), (2, 4, 4, 8))
    variables = jax.jit(block.init)(jax.random.key(1, impl="rbg"), x)
    apply = jax.jit(block.apply)
    assert not np.allclose(apply(variables, x), x)
    variables["params"]["excite"]["bias"] = jnp.full(8, -200.0)
    np.testing.assert_array_equal(apply(variables, x), x)


def test_a_depth_that_fits_no_stages_is_refused():
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 .* got 18"):
        abstract.variables(models.ResNet(num_classes=10, depth=18), CIFAR)
    with pytest.raises(ValueError, match=r"depth must be one of \[18, 34, 50\]; got 20"):
        abstract.variables(models.ImageNetResNet(num_classes=10, depth=20), CIFAR)


def test_an_unknown_stem_is_refused():
    with pytest.raises(ValueError, match=r"stem must be one of .*'imagenet'.*; got 'large'"):
        abstract.variables(models.ImageNetResNet(num_classes=10, stem="large"), CIFAR)

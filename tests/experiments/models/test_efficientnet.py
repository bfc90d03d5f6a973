import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.models.efficientnet import MBConv
from tests.support import abstract

IMAGENET = abstract.images(1, 224, 224, 3)


# Of the wider members the channels are rounded to multiples of eight; B1 is deeper alone.
@pytest.mark.parametrize(("depth", "published"), [(1.0, 5_288_548), (1.1, 7_794_184)])
def test_b0_and_b1_have_the_published_size(depth, published):
    model = models.EfficientNet(num_classes=1000, depth=depth)
    assert abstract.size(abstract.shapes(model, IMAGENET)) == published


def test_the_library_finds_all_kernels_of_b0():
    model = models.create("efficientnet_b0", 1000)
    shapes = abstract.shapes(model, IMAGENET)
    net = abstract.trace(model, IMAGENET)
    # Norms have 42,016 parameters; biases are the head's and those of squeeze-and-excitation.
    inputs = (32, 16, 24, 24, 40, 40, 80, 80, 80, 112, 112, 112, 192, 192, 192, 192)
    expanded = (32, *(6 * channels for channels in inputs[1:]))
    biases = 1000 + sum(inputs) // 4 + sum(expanded)
    assert net.size == abstract.size(shapes) - 42_016 - biases
    # Stem, top and head; five kernels a block, but four in the first one.
    assert len(net.layers) == 3 + 5 * 16 - 1
    depthwise = {layer.name: layer for layer in net.layers}["params/stage2_block1/depthwise/kernel"]
    assert depthwise.groups == 96


def test_stages_have_the_published_resolutions_and_channels():
    outputs = abstract.outputs(models.create("efficientnet_b0", 10), IMAGENET)
    assert outputs["stem"].shape == (1, 112, 112, 32)
    stages = [(112, 16), (56, 24), (28, 40), (14, 80), (14, 112), (7, 192), (7, 320)]
    for stage, (side, channels) in enumerate(stages, start=1):
        assert outputs[f"stage{stage}_block1"].shape == (1, side, side, channels)
    assert outputs["top"].shape == (1, 7, 7, 1280)
    assert outputs[""].shape == (1, 10)


def test_width_scales_the_channels_of_all_stages():
    outputs = abstract.outputs(models.create("efficientnet_b0", 10, 8), IMAGENET)
    channels = [outputs[f"stage{stage}_block1"].shape[-1] for stage in range(1, 8)]
    assert channels == [4, 6, 10, 20, 28, 48, 80]
    assert outputs["top"].shape[-1] == 320


def test_it_starts_as_the_authors_code():
    model = models.EfficientNet(num_classes=100)
    block = "stage6_block1"
    names = (f"{block}/expand", f"{block}/depthwise", f"{block}/squeeze", "head")
    expand, depthwise, squeeze, head = abstract.initial(
        model, abstract.images(1, 32, 32, 3), *(f"{name}/kernel" for name in names)
    )
    abstract.assert_normal(expand, math.sqrt(2 / 672))
    assert depthwise.shape == (5, 5, 1, 672)
    abstract.assert_normal(depthwise, math.sqrt(2 / 25))
    abstract.assert_normal(squeeze, math.sqrt(2 / 28))
    abstract.assert_uniform(head, 1 / math.sqrt(100))


def _block(**settings):
    norm = functools.partial(nn.BatchNorm, use_running_average=True)
    conv = functools.partial(nn.Conv, use_bias=False)
    block = MBConv(conv, norm, **({"expansion": 2, "width": 8, "stride": 1, "taps": 3} | settings))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    return block, jax.jit(block.init)(jax.random.key(1, impl="rbg"), x), x


def test_a_closed_gate_leaves_the_shortcut_alone():
    block, variables, x = _block()
    apply = jax.jit(block.apply)
    assert not np.allclose(apply(variables, x), x)
    variables["params"]["excite"]["bias"] = jnp.full(16, -200.0)
    np.testing.assert_array_equal(apply(variables, x), x)


@pytest.mark.parametrize("settings", [{"stride": 2}, {"width": 4}])
def test_a_block_that_changes_the_shape_has_no_shortcut(settings):
    block, variables, x = _block(**settings)
    variables["params"]["excite"]["bias"] = jnp.full(16, -200.0)
    np.testing.assert_array_equal(jax.jit(block.apply)(variables, x), 0)

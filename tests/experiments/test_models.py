import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai
from experiments import models
from experiments.config import ConfigError


def _shapes(model, images):
    init = functools.partial(model.init, train=False)
    return jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(images, jnp.float32))


def test_resnet20_has_the_published_number_of_prunable_weights():
    variables = _shapes(models.create("resnet20", 10, 16), (1, 32, 32, 3))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    kernels = [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"]
    assert sum(map(math.prod, kernels)) == 270_896
    # 19 convolutions of 3x3, two shortcuts and the head.
    assert len(kernels) == 22


def test_the_library_finds_all_kernels_of_resnet20():
    model = models.create("resnet20", 10, 16)
    variables = _shapes(model, (1, 32, 32, 3))
    net = dpai.trace(
        functools.partial(model.apply, train=False),
        variables,
        jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),
    )
    assert net.size == 270_896
    assert len(net.layers) == 22


def test_stages_halve_the_image_and_double_the_channels():
    model = models.create("resnet20", 7, 4)
    images = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)

    def outputs(images):
        variables = model.init(jax.random.key(0), images)
        return model.apply(
            variables, images, capture_intermediates=_is_block, mutable="intermediates"
        )

    logits, captured = jax.eval_shape(outputs, images)
    blocks = captured["intermediates"]
    shapes = {name: block["__call__"][0].shape for name, block in blocks.items()}
    assert logits.shape == (2, 7)
    for stage, shape in enumerate([(2, 8, 8, 4), (2, 4, 4, 8), (2, 2, 2, 16)], start=1):
        for block in (1, 2, 3):
            assert shapes[f"stage{stage}_block{block}"] == shape


def _is_block(module, _):
    return isinstance(module, models.resnet.BasicBlock)


@pytest.mark.parametrize(("depth", "layers"), [(8, 10), (20, 22), (56, 58)])
def test_depth_sets_the_number_of_layers(depth, layers):
    variables = _shapes(models.ResNet(num_classes=10, depth=depth), (1, 8, 8, 1))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    assert sum(path[-1].key == "kernel" for path, _ in leaves) == layers


def test_only_training_updates_the_batch_statistics():
    model = models.ResNet(num_classes=10, width=2, depth=8)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1, impl="rbg"), images)
    step = jax.jit(functools.partial(model.apply, mutable="batch_stats"), static_argnames="train")
    before = variables["batch_stats"]["stem_norm"]["mean"]
    evaluated = step(variables, images, train=False)[1]["batch_stats"]["stem_norm"]["mean"]
    trained = step(variables, images, train=True)[1]["batch_stats"]["stem_norm"]["mean"]
    convolved = nn.Conv(2, (3, 3), use_bias=False).apply(
        {"params": variables["params"]["stem"]}, images
    )
    np.testing.assert_array_equal(evaluated, before)
    np.testing.assert_allclose(trained, 0.1 * convolved.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_a_depth_that_fits_no_stages_is_refused():
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2 .* got 18"):
        _shapes(models.ResNet(num_classes=10, depth=18), (1, 8, 8, 1))


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model must be one of \[.*'resnet20'.*\]; got 'resnet'"):
        models.create("resnet", 10, 16)

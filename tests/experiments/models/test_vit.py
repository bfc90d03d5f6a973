import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.config import ConfigError
from tests.support import abstract

IMAGENET = abstract.images(1, 224, 224, 3)


@pytest.mark.parametrize(
    ("name", "published"),
    [("vit_ti16", 5_717_416), ("vit_s16", 22_050_664), ("vit_b16", 86_567_656)],
)
def test_each_size_has_the_published_number_of_parameters(name, published):
    assert abstract.size(abstract.shapes(models.create(name, 1000), IMAGENET)) == published


@pytest.mark.parametrize(
    ("name", "side", "tokens"), [("vit_ti4", 32, 64), ("vit_s8", 64, 64), ("vit_b16", 224, 196)]
)
def test_a_name_ends_in_the_size_of_the_patches(name, side, tokens):
    shapes = abstract.shapes(models.create(name, 10), abstract.images(1, side, side, 3))
    patch, width = math.isqrt(side**2 // tokens), shapes["class_token"][-1]
    assert shapes["patches/kernel"] == (patch, patch, 3, width)
    assert shapes["positions"] == (1, tokens + 1, width)


@pytest.mark.parametrize(("name", "heads"), [("vit_ti16", 3), ("vit_s16", 6), ("vit_b16", 12)])
def test_heads_have_64_features(name, heads):
    model = models.create(name, 10).clone(depth=1)
    shape = abstract.kernels(model, IMAGENET)["block1/attention/query/kernel"]
    assert shape == (64 * heads, heads, 64)


def test_the_library_finds_the_kernels_and_neither_positions_nor_class_token():
    net = abstract.trace(models.create("vit_b16", 1000), IMAGENET)
    attention = [f"attention/{name}/kernel" for name in ("query", "key", "value", "out")]
    names = [*attention, "mlp_in/kernel", "mlp_out/kernel"]
    expected = {f"params/block{block}/{name}" for block in range(1, 13) for name in names}
    expected |= {"params/patches/kernel", "params/head/kernel"}
    assert {layer.name for layer in net.layers} == expected
    # A block has four kernels of 768² and two of 4 · 768².
    assert net.size == 16 * 16 * 3 * 768 + 12 * 12 * 768**2 + 768 * 1000


def test_it_starts_as_the_authors_code_but_for_the_head():
    model = models.ViT(num_classes=100, width=96, depth=1, heads=3, patch=8)
    names = ["patches", "block1/attention/query", "block1/attention/out", "block1/mlp_in", "head"]
    names = [
        *(f"{name}/kernel" for name in names),
        "block1/mlp_in/bias",
        "positions",
        "class_token",
    ]
    x = abstract.images(1, 32, 32, 3)
    patches, query, out, mlp, head, bias, positions, token = abstract.initial(model, x, *names)
    abstract.assert_deviates(patches, math.sqrt(1 / (8 * 8 * 3)))
    abstract.assert_uniform(query, math.sqrt(6 / (96 + 96)))
    abstract.assert_uniform(out, math.sqrt(6 / (96 + 96)))
    abstract.assert_uniform(mlp, math.sqrt(6 / (96 + 384)))
    abstract.assert_deviates(head, math.sqrt(1 / 96))
    abstract.assert_normal(bias, 1e-6)
    abstract.assert_normal(positions, 0.02)
    assert not token.any()


def test_patches_are_told_apart_by_their_positions_alone():
    model = models.ViT(num_classes=5, width=6, depth=1, heads=3, patch=2)
    image = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
    # The four patches in another order.
    swapped = jnp.roll(image, 2, axis=1)
    variables = jax.jit(model.init)(jax.random.key(1, impl="rbg"), image)
    apply = jax.jit(model.apply)
    assert not np.allclose(apply(variables, image), apply(variables, swapped), atol=1e-4)
    variables["params"]["positions"] *= 0
    np.testing.assert_allclose(apply(variables, image), apply(variables, swapped), atol=1e-5)


def test_images_that_patches_do_not_tile_are_refused():
    with pytest.raises(ConfigError, match=r"multiple of the patch size 16 .*; got 8x8"):
        abstract.variables(models.create("vit_ti16", 10), abstract.images(1, 8, 8, 1))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"width must be a multiple of the 12 .* got 100"):
        abstract.variables(models.create("vit_b16", 10, 100), IMAGENET)

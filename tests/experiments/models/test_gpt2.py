import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.config import ConfigError
from tests.support import abstract

SMALL = models.GPT2(num_classes=11, width=8, depth=2, heads=2, context=6)
IDS = jax.random.randint(jax.random.key(0), (2, 6), 0, 11)


def test_it_has_the_published_size():
    model = models.create("gpt2", 50_257)
    shapes = abstract.shapes(model, abstract.tokens(1, 1024))
    assert abstract.size(shapes) == 124_439_808
    assert shapes["positions"] == (1, 1024, 768)


def test_the_library_finds_the_kernels_and_the_embedding_as_the_head():
    net = abstract.trace(models.create("gpt2", 50_257), abstract.tokens(1, 1024))
    attention = [f"attention/{name}/kernel" for name in ("query", "key", "value", "out")]
    names = [*attention, "mlp_in/kernel", "mlp_out/kernel"]
    expected = {f"params/block{block}/{name}" for block in range(1, 13) for name in names}
    # A lookup is no contraction, but the same embedding makes the logits, and there it is one.
    expected.add("params/embed/embedding")
    assert {layer.name for layer in net.layers} == expected
    # A block has four kernels of 768² and two of 4 · 768².
    assert net.size == 12 * 12 * 768**2 + 50_257 * 768


@pytest.fixture(scope="module")
def variables():
    return jax.jit(SMALL.init)(jax.random.key(1, impl="rbg"), IDS)


def test_a_token_changes_the_logits_from_its_place_on(variables):
    apply = jax.jit(SMALL.apply)
    before, after = apply(variables, IDS), apply(variables, IDS.at[:, 3].add(1) % 11)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    changed = np.abs(before[:, 3:] - after[:, 3:]).max(-1)
    assert np.all(changed > 1e-5)


def test_a_shorter_sequence_has_the_first_positions(variables):
    apply = jax.jit(SMALL.apply)
    whole, part = apply(variables, IDS), apply(variables, IDS[:, :4])
    np.testing.assert_allclose(part, whole[:, :4], rtol=1e-4, atol=1e-6)


def test_logits_are_products_with_the_embedding(variables):
    def fn(variables, ids):
        return SMALL.apply(variables, ids, capture_intermediates=True, mutable="intermediates")

    logits, captured = jax.jit(fn)(variables, IDS)
    (features,) = captured["intermediates"]["norm"]["__call__"]
    embedding = np.asarray(variables["params"]["embed"]["embedding"])
    np.testing.assert_allclose(logits, np.asarray(features) @ embedding.T, rtol=1e-4, atol=1e-5)


def test_it_starts_as_published():
    model = models.GPT2(num_classes=100, width=64, depth=3, heads=4, context=50)
    kernels = ("attention/query", "attention/out", "mlp_in", "mlp_out")
    names = ["embed/embedding", "positions", *(f"block2/{name}/kernel" for name in kernels)]
    embedding, positions, query, out, mlp_in, mlp_out = abstract.initial(
        model, abstract.tokens(1, 5), *names
    )
    for weights in (embedding, positions, query, mlp_in):
        abstract.assert_normal(weights, 0.02)
    for weights in (out, mlp_out):
        abstract.assert_normal(weights, 0.02 / math.sqrt(2 * 3))


def test_what_is_no_tokens_is_refused():
    with pytest.raises(
        ConfigError, match=r"gpt2 takes integer token ids .* float32 .*\(1, 8, 8, 1"
    ):
        abstract.variables(SMALL, abstract.images(1, 8, 8, 1))
    with pytest.raises(ConfigError, match=r"must not exceed the context of 6 tokens; got 7"):
        abstract.variables(SMALL, abstract.tokens(1, 7))
    with pytest.raises(ConfigError, match=r"multiple of the 2 attention heads; got 5"):
        abstract.variables(SMALL.clone(width=5), abstract.tokens(1, 6))


def test_integers_of_any_size_are_token_ids():
    ids = jax.ShapeDtypeStruct((1, 6), jnp.uint8)
    assert jax.eval_shape(SMALL.apply, abstract.variables(SMALL, ids), ids).shape == (1, 6, 11)

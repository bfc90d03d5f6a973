"""Elementwise functions: activations keep the unit, statistics normalise it, products gate it."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ad_checkpoint, lax
from jax.extend.core import primitives

import dpai_jax as dpai
from dpai_jax.paths import Flow, Independent
from dpai_jax.paths import values as v
from tests.support.flows import (
    assert_normal,
    binary,
    counts,
    draw,
    evaluate,
    factors,
    flow,
    gradients,
    weight,
)

Function = Callable[..., Any]
GATES = ("jacobian", "balanced", "signal")


def primitives_of(jaxpr: Any) -> set[str]:
    """The names of all primitives in a jaxpr, also those inside of calls."""
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        for value in eqn.params.values():
            if hasattr(value, "eqns"):
                names |= primitives_of(value)
    return names


# Functions of one real number, by the name of the primitive that each becomes.
REAL: dict[str, Function] = {
    "abs": jnp.abs,
    "acos": lax.acos,
    "acosh": lax.acosh,
    "asin": lax.asin,
    "asinh": lax.asinh,
    "atan": lax.atan,
    "atanh": lax.atanh,
    "bessel_i0e": lax.bessel_i0e,
    "bessel_i1e": lax.bessel_i1e,
    "cbrt": lax.cbrt,
    "ceil": lax.ceil,
    "convert_element_type": lambda x: x.astype(jnp.bfloat16),
    "copy": jnp.copy,
    "cos": lax.cos,
    "cosh": lax.cosh,
    "device_put": lambda x: jax.device_put(x, jax.devices()[0]),
    "digamma": lax.digamma,
    "erf": lax.erf,
    "erf_inv": lax.erf_inv,
    "erfc": lax.erfc,
    "exp": lax.exp,
    "exp2": lax.exp2,
    "expm1": lax.expm1,
    "floor": lax.floor,
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "lgamma": lax.lgamma,
    "log": lax.log,
    "log1p": lax.log1p,
    "logistic": lax.logistic,
    "name": lambda x: ad_checkpoint.checkpoint_name(x, "x"),
    "neg": lax.neg,
    "optimization_barrier": lax.optimization_barrier,
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 10),
    "round": lax.round,
    "rsqrt": lax.rsqrt,
    "sharding_constraint": lambda x: lax.with_sharding_constraint(
        x, jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    "sign": lax.sign,
    "sin": lax.sin,
    "sinh": lax.sinh,
    "sqrt": lax.sqrt,
    "square": lax.square,
    "stop_gradient": lax.stop_gradient,
    "tan": lax.tan,
    "tanh": lax.tanh,
}
# Functions of a flow and of numbers that do not depend on the input.
WITH_FREE: dict[str, Function] = {
    "add": lambda x, c: x + c,
    "add_any": primitives.add_jaxvals_p.bind,
    "atan2": lax.atan2,
    "clamp": lambda x, c: lax.clamp(c, x, c + 1),
    "complex": lambda x, c: lax.real(lax.complex(x, c)),
    "conj": lambda x, c: lax.real(lax.conj(lax.complex(x, c))),
    "div": lambda x, c: x / c,
    "igamma": lax.igamma,
    "igammac": lax.igammac,
    "imag": lambda x, c: lax.imag(lax.complex(c, x)),
    "max": jnp.maximum,
    "min": jnp.minimum,
    "mul": lambda x, c: x * c,
    "nextafter": lax.nextafter,
    "polygamma": lambda x, c: lax.polygamma(c, x),
    "pow": lax.pow,
    "regularized_incomplete_beta": lambda x, c: lax.betainc(c, c, x),
    "rem": lax.rem,
    "select_n": lambda x, c: jnp.where(c > 0, x, c),
    "sub": lambda x, c: c - x,
    "zeta": lax.zeta,
}
# The same for whole numbers, such as token ids.
WHOLE: dict[str, Function] = {
    "and": lambda x, c: x & c,
    "clz": lambda x, _: lax.clz(x),
    "eq": lambda x, c: x == c,
    "ge": lambda x, c: x >= c,
    "gt": lambda x, c: x > c,
    "le": lambda x, c: x <= c,
    "lt": lambda x, c: x < c,
    "mulhi": lax.mulhi,
    "ne": lambda x, c: x != c,
    "not": lambda x, _: ~x,
    "or": lambda x, c: x | c,
    "population_count": lambda x, _: lax.population_count(x),
    "shift_left": lax.shift_left,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
    "shift_right_logical": lax.shift_right_logical,
    "xor": lambda x, c: x ^ c,
}


@pytest.mark.parametrize("name", [*REAL, *WITH_FREE, *WHOLE])
def test_an_elementwise_function_keeps_unit_and_counts(name):
    fn = REAL.get(name) or WITH_FREE.get(name) or WHOLE[name]
    dtype = jnp.int32 if name in WHOLE else jnp.float32
    x = flow(draw(0, 2, 1), (2, 3), exponent=5, unit="x", ancestors=["input"])
    operands = [x] if name in REAL else [x, Independent((2, 3))]
    structs = [jax.ShapeDtypeStruct((2, 3), dtype) for _ in operands]
    assert name in primitives_of(jax.make_jaxpr(fn)(*structs))

    result = evaluate(fn, *operands, dtypes=[dtype] * len(operands))
    assert result.unit == "x"
    assert result.lineage == {"x", "input"}
    np.testing.assert_array_equal(counts(result), counts(x))


@pytest.mark.parametrize("name", ["clamp", "select_n", "complex"])
def test_where_only_a_later_operand_flows_its_paths_pass(name):
    fns: dict[str, Function] = {
        "clamp": lambda c, x: lax.clamp(c, c, x),
        "select_n": lambda c, x: jnp.where(c > 0, c, x),
        "complex": lambda c, x: lax.imag(lax.complex(c, x)),
    }
    x = flow(draw(0, 2, 3), unit="x")
    result = evaluate(fns[name], Independent((2, 3)), x)
    assert result.unit == "x"
    np.testing.assert_array_equal(counts(result), counts(x))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x > 0,
        lambda x: x == 1,
        lambda x: jnp.isfinite(x),
        lambda x: x.astype(jnp.int32),
        lambda x: (x * 8).astype(jnp.int8).astype(jnp.float32),
    ],
)
def test_no_path_passes_a_switch_or_a_code_made_of_real_numbers(fn):
    result = evaluate(fn, flow(draw(0, 2, 3)))
    assert isinstance(result, Independent)
    assert result.known is None


def test_token_ids_become_a_one_hot_code_of_one_path_to_each_entry():
    ids = flow(np.ones((1, 1)), (2, 3))
    code = evaluate(lambda ids: jax.nn.one_hot(ids, 5), ids, dtypes=[jnp.int32])
    np.testing.assert_array_equal(counts(code), np.ones((2, 3, 5)))


def test_a_switched_unit_is_that_unit():
    """A leaky ReLU written by hand: the predicate is no path, both cases are the unit."""
    x = flow(draw(0, 2, 3), unit="x")
    result = evaluate(lambda x: jnp.where(x > 0, x, 0.01 * x), x)
    assert result.unit == "x"
    np.testing.assert_array_equal(counts(result), counts(x))


ACTIVATIONS: dict[str, Function] = {
    "identity": lambda z: z,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "tanh": jnp.tanh,
    "hard tanh": jax.nn.hard_tanh,
    "soft sign": jax.nn.soft_sign,
    "silu": jax.nn.silu,
    "silu by hand": lambda z: z / (1 + jnp.exp(-z)),
    "gelu by erf": functools.partial(jax.nn.gelu, approximate=False),
    "gelu by tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick gelu": lambda z: z * jax.nn.sigmoid(1.702 * z),
    "hard swish": jax.nn.hard_swish,
    "hard swish by hand": lambda z: z * jax.nn.relu6(z + 3) / 6,
    "mish": jax.nn.mish,
    "squared relu": lambda z: jnp.square(jax.nn.relu(z)),
    "sin": jnp.sin,
    "snake": lambda z: z + jnp.square(jnp.sin(z)),
    "scaled": lambda z: 0.5 * z,
    "sigmoid": jax.nn.sigmoid,
    "hard sigmoid": jax.nn.hard_sigmoid,
    "hard sigmoid by hand": lambda z: jax.nn.relu6(z + 3) / 6,
    "softplus": jax.nn.softplus,
    "softplus by hand": lambda z: jnp.log1p(jnp.exp(z)),
    "squareplus": jax.nn.squareplus,
    "switched by a comparison": lambda z: jnp.where(z > 0, z, jnp.exp(z)),
    "switched the other way": lambda z: jnp.where(z >= 0, z, jnp.exp(z)),
    "clipped to one": lambda z: jnp.where(jnp.abs(z) < 1, jnp.cos(z), 0 * z),
    "exp": jnp.exp,
    "cos": jnp.cos,
    "gaussian": lambda z: jnp.exp(-jnp.square(z)),
    "shifted": lambda z: 1 + z,
    "elu plus one": lambda z: jax.nn.elu(z) + 1,
    "complement of a sigmoid": lambda z: 1 - jax.nn.sigmoid(z),
    "two sigmoid": lambda z: 2 * jax.nn.sigmoid(z),
    "tanh through sigmoid": lambda z: 2 * jax.nn.sigmoid(2 * z) - 1,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_passes_paths_once_and_gives_at_zero_what_it_gives_at_zero(name):
    phi = ACTIVATIONS[name]
    z = flow(draw(0, 2, 3), unit="z")
    result = evaluate(phi, z)
    assert result.unit == "z"
    np.testing.assert_array_equal(counts(result), counts(z))
    assert result.at_zero == pytest.approx(float(phi(jnp.zeros(()))), abs=1e-7)
    assert result.always_alive == (float(phi(jnp.zeros(()))) != 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", ["gelu by tanh", "hard sigmoid", "shifted"])
def test_what_an_activation_gives_at_zero_is_found_in_any_precision(name, dtype):
    result = evaluate(ACTIVATIONS[name], flow(draw(0, 2, 3)), dtypes=[dtype])
    assert result.always_alive == (float(ACTIVATIONS[name](jnp.zeros((), dtype))) != 0)


@pytest.mark.parametrize(
    ("fn", "alive"),
    [
        (lambda z, c: z * c + c, False),
        (lambda z, c: jax.nn.relu(z * c + c), False),
        (lambda z, c: jax.nn.sigmoid(z * c + c), True),
        (lambda z, c: jnp.exp(z - c), True),
        (lambda z, c: jnp.maximum(z, c), False),
        (lambda z, c: c / z, True),
        (lambda z, c: z / c, False),
        (lambda z, c: jnp.where(c > 0, jax.nn.sigmoid(z), z), False),
        (lambda z, c: jnp.where(c > 0, jax.nn.sigmoid(z), jnp.exp(z)), True),
    ],
)
def test_constants_of_unknown_value_change_nothing_at_zero(fn, alive):
    assert evaluate(fn, flow(draw(0, 2, 3)), Independent((2, 3))).always_alive == alive


def test_known_constants_count_at_zero():
    z = flow(draw(0, 2, 3))
    assert evaluate(lambda z: z + jnp.full((2, 3), 2.0), z).at_zero == 2.0
    assert evaluate(lambda z: (z + 3.0) * jnp.ones((2, 3)) / 6, z).at_zero == 0.5
    assert not evaluate(lambda z: (z + 3.0) - jnp.full((3,), 3.0)[None], z).always_alive


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_product_with_zero_is_a_constant_that_no_path_passes(dtype):
    x = flow(draw(0, 2, 3))
    nothing = evaluate(lambda x: x * 0 + 1, x, dtypes=[dtype])
    assert isinstance(nothing, Independent)
    assert nothing.shape == (2, 3)
    assert nothing.scalar == 1
    assert nothing.known.value.dtype == dtype
    joined = evaluate(lambda x: jnp.concatenate([0 * x, x]), x, dtypes=[dtype])
    np.testing.assert_array_equal(counts(joined), np.concatenate([np.zeros((2, 3)), counts(x)]))


def test_constants_never_scale_a_count():
    x = flow(draw(0, 2, 3), unit="x")
    for scale in (-1.0, 1e-30, 1e30, 0.5):
        result = evaluate(lambda x, scale=scale: x * scale / 7 - scale, x)
        np.testing.assert_array_equal(counts(result), counts(x))


NORMALISATIONS: dict[str, Function] = {
    "centred": lambda x: x - jnp.mean(x, -1, keepdims=True),
    "scaled to variance": lambda x: x * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6),
    "standardised": lambda x: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-6),
    "softmax": lambda x: jax.nn.softmax(x),
    "log softmax": lambda x: jax.nn.log_softmax(x),
    "softmax by hand": lambda x: (
        jnp.exp(x - x.max(1, keepdims=True))
        / jnp.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)
    ),
    "masked softmax": lambda x: jax.nn.softmax(
        jnp.where(jnp.tril(jnp.ones((4, 6), bool)), x, -1e9)
    ),
    "unit length": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "unit length, clipped": lambda x: x / jnp.maximum(jnp.sqrt((x * x).sum(1))[:, None], 1e-6),
    "centred by log-sum-exp": lambda x: x - jax.nn.logsumexp(x, axis=0)[None],
    "scaled by the largest": lambda x: x / jnp.max(jnp.abs(x)),
    "running sum taken off": lambda x: x - jnp.cumsum(x, 0),
    "local response": lambda x: (
        x / (1 + lax.reduce_window(x * x, 0.0, lax.add, (1, 3), (1, 1), "SAME")) ** 0.75
    ),
    "smoothed": lambda x: x - lax.reduce_window(x, -jnp.inf, lax.max, (3, 1), (1, 1), "SAME"),
}


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """As Flax writes it: the variance as the mean of squares less the square of the mean."""
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.maximum(jnp.mean(x * x, -1, keepdims=True) - mean * mean, 0.0)
    return (x - mean) * (lax.rsqrt(variance + 1e-6) * scale[None]) + bias[None]


def rms_norm(x: jax.Array, scale: jax.Array, _: jax.Array) -> jax.Array:
    return scale[None] * (x * lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6))


def batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    mean, variance = jnp.mean(x, 0), jnp.var(x, 0)
    return (x - mean[None]) / jnp.sqrt(variance + 1e-5)[None] * scale[None] + bias[None]


def running_norm(x: jax.Array, mean: jax.Array, variance: jax.Array) -> jax.Array:
    return (x - mean[None]) * lax.rsqrt(variance + 1e-5)[None]


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Statistics of groups brought back to the channels, as Flax does."""
    groups = x.reshape(4, 2, 3)
    mean = jnp.repeat(groups.mean(-1), 3, axis=1)
    variance = jnp.repeat(jnp.square(groups).mean(-1), 3, axis=1) - mean * mean
    return (x - mean) * lax.rsqrt(variance + 1e-6) * scale[None] + bias[None]


def group_norm_reshaped(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalised in groups and reshaped back, as Haiku and Equinox do."""
    groups = x.reshape(4, 2, 3)
    normal = (groups - groups.mean(-1, keepdims=True)) * lax.rsqrt(
        groups.var(-1, keepdims=True) + 1e-6
    )
    return normal.reshape(4, 6) * scale[None] + bias[None]


def rotated_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions as Llama's: the second half, negated, before the first."""
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos[None] + jnp.concatenate([-second, first], axis=-1) * sin[None]


def rotated_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary positions as GPT-J's: each odd entry, negated, before its even neighbour."""
    pairs = jnp.stack([-x[:, 1::2], x[:, ::2]], axis=-1).reshape(x.shape)
    return x * cos[None] + pairs * sin[None]


LAYERS: dict[str, Function] = {
    "layer norm": layer_norm,
    "rms norm": rms_norm,
    "batch norm": batch_norm,
    "batch norm by running statistics": running_norm,
    "group norm": group_norm,
    "group norm, reshaped": group_norm_reshaped,
    "rotary positions by halves": rotated_halves,
    "rotary positions by pairs": rotated_pairs,
}


@pytest.mark.parametrize("held", [(4, 6), (1, 6), (4, 1)])
@pytest.mark.parametrize("name", [*NORMALISATIONS, *LAYERS])
def test_normalisation_leaves_counts_as_they_are(name, held):
    x = flow(draw(0, *held), (4, 6), unit="x")
    if name in LAYERS:
        result = evaluate(LAYERS[name], x, Independent((6,)), Independent((6,)))
    else:
        result = evaluate(NORMALISATIONS[name], x)
    np.testing.assert_array_equal(counts(result), counts(x))


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("fn", [layer_norm, rms_norm, group_norm])
def test_normalisation_is_no_gate(fn, gates):
    x = flow(draw(0, 4, 6), unit="x")
    result = evaluate(fn, x, Independent((6,)), Independent((6,)), gates=gates)
    assert result.unit == "x"
    np.testing.assert_array_equal(counts(result), counts(x))


def test_a_variance_is_a_statistic_however_it_is_written():
    x = flow(draw(0, 4, 6), unit="x")
    for fn in (
        lambda x: jnp.mean(x * x, 1) - jnp.mean(x, 1) ** 2,
        lambda x: jnp.mean(x**2, 1) - jnp.square(jnp.mean(x, 1)),
        lambda x: jnp.mean((x - x.mean(1, keepdims=True)) ** 2, 1),
        lambda x: jnp.var(x, 1),
        lambda x: jnp.sum(x, 1) / jnp.max(x, 1),
        lambda x: jnp.einsum("ij,ij->i", x, x),
    ):
        assert "x" in evaluate(fn, x).lineage


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.T - jnp.mean(x, 1)[None],
        lambda x: x.T[None] / jnp.max(x, 1)[None, None],
        lambda x: x.reshape(8, 3) * jnp.sum(jnp.square(x)),
        lambda x: jnp.exp(x).T.reshape(6, 4) / jnp.exp(x).sum(1).reshape(1, 4),
    ],
)
def test_a_statistic_normalises_a_rearrangement_of_what_it_was_taken_of(fn, gates):
    x = flow(draw(0, 4, 6))
    result = evaluate(fn, x, gates=gates)
    assert counts(result).sum() == pytest.approx(counts(x).sum())
    assert sorted(counts(result).flat) == pytest.approx(sorted(counts(x).flat))


def test_two_rearrangements_of_a_unit_are_two_units():
    x = flow(draw(0, 4))
    own = counts(x)
    differences = evaluate(lambda x: x[:, None] - x[None, :], x)
    np.testing.assert_array_equal(counts(differences), own[:, None] + own[None, :])
    products = evaluate(lambda x: x[:, None] * x[None, :], x)
    np.testing.assert_array_equal(counts(products), own[:, None] + own[None, :])


def test_centring_leaves_a_gradient_of_one():
    def centre(array: Any) -> Flow:
        return evaluate(lambda x: x - x.mean(1, keepdims=True), flow(array, unit="x"))

    probe = draw(1, 2, 3)
    (slope,) = gradients(centre, probe, draw(0, 2, 3))
    np.testing.assert_array_equal(slope, probe)


SUMS: dict[str, Function] = {
    "add": operator.add,
    "sub": operator.sub,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "atan2": lax.atan2,
    "rem": lax.rem,
    "complex": lambda a, b: jnp.abs(lax.complex(a, b)),
    "select_n": lambda a, b: jnp.where(jnp.eye(3, dtype=bool)[:2], a, b),
    "several sums of the same units": jnp.logaddexp,
    "a maximum by a sum and a difference": lambda a, b: ((a + b) + jnp.abs(a - b)) / 2,
}


@pytest.mark.parametrize("name", SUMS)
def test_paths_of_different_units_add_up(name):
    a = flow(draw(0, 2, 3), exponent=2, ancestors=["input", "a's own"])
    b = flow(draw(1, 1, 3), (2, 3), exponent=-1, ancestors=["input"])
    result = evaluate(SUMS[name], a, b)
    np.testing.assert_array_equal(counts(result), counts(a) + counts(b))
    assert result.unit not in {a.unit, b.unit}
    assert result.ancestors == {"input"}


def test_paths_of_three_units_add_up():
    a, b, c = (flow(draw(i, 2, 3)) for i in range(3))
    result = evaluate(lambda a, b, c: lax.clamp(a, b, c), a, b, c)
    np.testing.assert_array_equal(counts(result), counts(a) + counts(b) + counts(c))
    scalar = flow(draw(3)[()] + 1)
    result = evaluate(lambda a, s: lax.clamp(s, a, 1.0), a, scalar)
    np.testing.assert_array_equal(counts(result), counts(a) + counts(scalar))


def test_a_residual_branch_adds_its_paths():
    x, mask = flow(draw(0, 2, 3), unit="x"), draw(1, 3, 3)
    result = evaluate(lambda x, w: x + jax.nn.relu(x @ w), x, weight(mask))
    np.testing.assert_array_equal(counts(result), counts(x) + counts(x) @ mask)
    # The sum is a new unit: it stands in no relation to the x that it holds.
    twice = evaluate(lambda x, w: x + (x + jax.nn.relu(x @ w)), x, weight(mask))
    np.testing.assert_array_equal(counts(twice), 2 * counts(x) + counts(x) @ mask)


def test_an_empty_branch_adds_nothing_and_gets_a_gradient():
    x = flow([[1.0, 2.0]], exponent=40)

    def network(mask: Any) -> Flow:
        return evaluate(lambda x, w: jnp.maximum(x, x @ w), x, weight(mask))

    np.testing.assert_array_equal(counts(network(np.zeros((2, 2)))), counts(x))
    (slope,) = gradients(network, [[1.0, 0.0]], np.zeros((2, 2)))
    np.testing.assert_array_equal(slope, counts(x).T * [1.0, 0.0])


def expected_product(a: Flow, b: Flow, gates: str) -> np.ndarray:
    """The terms of a product: each factor's counts where the other gives something."""
    x, y = factors(a, b, gates)
    alive_a, alive_b = (np.where(f.always_alive, 1.0, counts(f) > 0) for f in (a, b))
    return alive_b * x + alive_a * y


PRODUCTS: dict[str, Function] = {"mul": operator.mul, "div": operator.truediv, "pow": lax.pow}


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rests", [(0.0, 0.0), (0.5, 0.0), (0.0, math.inf), (1.0, 2.0)])
def test_a_product_has_the_paths_of_each_factor_where_the_other_is_alive(name, rests, gates):
    a = flow(draw(0, 2, 3), exponent=3, at_zero=rests[0])
    b = flow(draw(1, 1, 3) * 3, (2, 3), at_zero=rests[1])
    # A quotient multiplies by a reciprocal, which is never zero.
    second = flow(draw(1, 1, 3) * 3, (2, 3), at_zero=math.inf) if name == "div" else b
    result = evaluate(PRODUCTS[name], a, b, gates=gates)
    np.testing.assert_allclose(counts(result), expected_product(a, second, gates), rtol=1e-6)
    assert_normal(result)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("rest", [0.0, 0.5])
def test_a_dead_factor_is_dead_unless_it_is_alive_at_zero(rest, gates):
    """A gated unit whose gate no path reaches: a SwiGLU branch, against a sigmoid of zeros."""
    signal, gate = flow(draw(0, 2, 3)), flow(np.zeros((2, 3)), at_zero=rest)
    result = evaluate(operator.mul, signal, gate, gates=gates)
    exact = counts(signal) if rest else np.zeros((2, 3))
    np.testing.assert_array_equal(counts(result), exact)
    assert evaluate(operator.mul, gate, signal, gates=gates).always_alive is False


def test_a_gradient_reaches_a_dead_factor_and_can_revive_it():
    signal = flow([[3.0, 0.0]], exponent=1)
    (slope,) = gradients(
        lambda array: evaluate(operator.mul, signal, flow(array)), [[1.0, 1.0]], [[0.0, 0.0]]
    )
    np.testing.assert_array_equal(slope, [[1.0, 0.0]])


@pytest.mark.parametrize("gates", ["jacobian", "balanced"])
def test_a_gate_passes_its_gradient_and_its_scale_is_a_constant(gates):
    """Of signal + scale·gate, where the scale brings both to one peak: slope one, slope scale."""
    signal, gate = draw(0, 2, 3) + 1, draw(1, 2, 3) + 1
    scale = signal.max() / gate.max() if gates == "balanced" else 1.0

    def product(x: Any, y: Any) -> Flow:
        return evaluate(operator.mul, flow(x), flow(y, at_zero=0.5), gates=gates)

    of_signal, of_gate = gradients(product, np.ones((2, 3)), signal, gate)
    np.testing.assert_allclose(of_signal, np.ones((2, 3)), rtol=1e-6)
    np.testing.assert_allclose(of_gate, np.full((2, 3), scale), rtol=1e-6)


def test_a_gate_that_is_left_out_gets_no_gradient():
    def product(y: Any) -> Flow:
        return evaluate(operator.mul, flow(draw(0, 2, 3)), flow(y, at_zero=0.5), gates="signal")

    (slope,) = gradients(product, np.ones((2, 3)), draw(1, 2, 3))
    assert not slope.any()


@pytest.mark.parametrize("gates", GATES)
def test_saturating_products_are_reached_where_a_factor_is_and_the_other_is_alive(gates):
    a, b = np.asarray([[1.0, 0.0, 1.0, 0.0]]), np.asarray([[1.0, 1.0, 0.0, 0.0]])
    multiply = functools.partial(evaluate, operator.mul, gates=gates, saturating=True)
    np.testing.assert_array_equal(multiply(binary(a), binary(b)).mantissa, a * b)
    alive = v.replace(binary(b), at_zero=0.5)
    np.testing.assert_array_equal(multiply(binary(a), alive).mantissa, a)
    both = multiply(v.replace(binary(a), at_zero=0.5), alive)
    np.testing.assert_array_equal(both.mantissa, np.maximum(a, b))


def test_squeeze_and_excite_gates_by_what_it_pools():
    """x · σ(relu(pool(x) W) U): the gate's counts join those of x wherever x is alive."""

    def block(x: Any, w: Any, u: Any) -> Any:
        pooled = jnp.mean(x, (1, 2))
        return x * jax.nn.sigmoid(jax.nn.relu(pooled @ w) @ u)[:, None, None]

    x, w, u = flow(draw(0, 1, 2, 2, 3)), draw(1, 3, 2), draw(2, 2, 3)
    gate = counts(x).sum((1, 2)) @ w @ u
    result = evaluate(block, x, weight(w), weight(u, 1))
    alive = counts(x) > 0
    np.testing.assert_array_equal(counts(result), counts(x) + alive * gate[:, None, None])


@pytest.mark.parametrize(
    "fn",
    [
        lambda w: w.astype(jnp.bfloat16),
        lambda w: w * 0.1,
        lambda w: (w - w.mean(0)[None]) / (w.std(0)[None] + 1e-5),
        lambda w: w / jnp.linalg.norm(w),
        lambda w: jnp.where(jnp.abs(w) > 0.1, w, 0.0),
        lambda w: jnp.sign(w) * jnp.mean(jnp.abs(w)),
        lambda w: lax.stop_gradient(w) + (w - lax.stop_gradient(w)),
        lambda w: jnp.tanh(w) * w,
    ],
)
def test_a_function_of_a_kernel_that_keeps_its_shape_is_that_kernel(fn):
    mask = weight(draw(0, 3, 2), leaf=4)
    result = evaluate(fn, mask)
    assert result.sources == mask.sources
    np.testing.assert_array_equal(result.array, mask.array)


def test_a_product_of_two_kernels_is_none():
    a, b = weight(draw(0, 3, 2), 0), weight(draw(1, 3, 2), 1)
    assert isinstance(evaluate(operator.mul, a, b), Independent)
    assert isinstance(evaluate(lambda a: a * a.T, weight(draw(0, 3, 3))), Independent)


# Kernels (3, 4) made of leaves a (3, 4, 2) and b (3, 4), and the sum of masks that each stands for.
KERNEL_SUMS: dict[str, tuple[Any, Any]] = {
    "complex parts of one leaf": (
        lambda a, b: lax.complex(a[..., 0], a[..., 1]) * (0.5 - 2j),
        lambda a, b: a[..., 0] + a[..., 1],
    ),
    "an imaginary unit": (
        lambda a, b: b.astype(jnp.complex64) + jnp.complex64(1j) * a[..., 1].astype(jnp.complex64),
        lambda a, b: b + a[..., 1],
    ),
    "leaves": (lambda a, b: 2.0 * (a[..., 0] - 0.5 * b), lambda a, b: a[..., 0] + b),
    "three terms": (
        lambda a, b: (a[..., 0] + a[..., 1]) + (b + jnp.tanh(b)),
        lambda a, b: a[..., 0] + a[..., 1] + b,
    ),
    "side by side": (
        lambda a, b: jnp.concatenate([(b - a[..., 0])[:, :1], b[:, 1:3], jnp.ones((3, 1))], 1),
        lambda a, b: np.concatenate([(b + a[..., 0])[:, :1], b[:, 1:3], np.ones((3, 1))], 1),
    ),
    "in a compiled function": (
        lambda a, b: jax.jit(lambda k: jnp.stack([k, k * 2.0])[1])(a[..., 0] + a[..., 1]),
        lambda a, b: a[..., 0] + a[..., 1],
    ),
    "views": (lambda a, b: (b + a[..., 0])[::-1], lambda a, b: (b + a[..., 0])[::-1]),
}


@pytest.mark.parametrize("name", KERNEL_SUMS)
def test_kernels_that_are_added_up_each_give_paths(name):
    kernel, exact = KERNEL_SUMS[name]
    a, b, last = draw(1, 3, 4, 2), draw(2, 3, 4), draw(3, 4, 5)
    masks = {"a": a, "b": b, "last": last}

    def network(p: Any, x: Any) -> Any:
        made = kernel(p["a"], p["b"])
        hidden = (x.astype(made.dtype) @ made).real
        return jax.nn.relu(hidden) @ p["last"] + x @ (p["b"] @ p["last"])

    net = dpai.trace(network, masks, jnp.ones((2, 3)))
    found = {layer.name: layer for layer in net.layers}
    used = {"a", "b", "last"} - ({"b"} if "of one leaf" in name or "compiled" in name else set())
    assert set(found) == used
    assert (found["a"].inputs, found["a"].outputs) == ((0,), (1,))

    def paths(a: Any, b: Any, last: Any) -> Any:
        unpruned = np.ones((2, 3)) @ np.ones((3, 5))
        return np.sum(np.ones((2, 3)) @ exact(a, b) @ last + unpruned)

    leaves = [jnp.asarray(np.float32(masks[layer.name])) for layer in net.layers]
    total = paths(a, b, last)
    assert float(net.log_count(leaves)) == pytest.approx(np.log(total), rel=1e-6)
    slopes = jax.grad(net.log_count)(leaves)
    for layer, slope in zip(net.layers, slopes, strict=True):
        # The count is linear in each leaf.
        for place in [(0,) * len(layer.shape), tuple(n - 1 for n in layer.shape)]:
            moved = {name: mask.copy() for name, mask in masks.items()}
            moved[layer.name][place] += 1
            difference = (paths(**moved) - total) / total
            assert float(slope[place]) == pytest.approx(difference, rel=1e-5, abs=1e-7)
    reached = net.reached([jnp.asarray(leaf > 0, jnp.float32) for leaf in leaves])
    assert all(np.array_equal(r, slope > 0) for r, slope in zip(reached, slopes, strict=True))


def test_a_sum_of_kernels_may_be_scanned_over():
    """Layers whose complex kernels are made outside of the loop."""

    def network(p: Any, x: Any) -> Any:
        kernels = lax.complex(p["re"], p["im"])
        return lax.scan(lambda h, k: ((h.astype(k.dtype) @ k).real, None), x, kernels)[0]

    masks = {"re": draw(0, 2, 3, 3), "im": draw(1, 2, 3, 3)}
    net = dpai.trace(network, masks, jnp.ones((1, 3)))
    leaves = [jnp.asarray(np.float32(masks[layer.name])) for layer in net.layers]
    first, second = masks["re"] + masks["im"]
    exact = np.sum(np.ones((1, 3)) @ first @ second)
    assert float(net.log_count(leaves)) == pytest.approx(np.log(exact), rel=1e-6)


def test_a_kernel_scaled_by_unknown_constants_is_that_kernel():
    mask = weight(draw(0, 3, 2))
    np.testing.assert_array_equal(
        evaluate(operator.mul, mask, Independent((3, 2))).array, mask.array
    )


def test_known_zeros_take_weights_away():
    """An autoregressive mask: a weight that is multiplied by zero passes no path."""
    mask, lower = draw(0, 3, 3), np.tril(np.ones((3, 3), np.float32))
    result = evaluate(lambda w: w * (2 * lower), weight(mask))
    np.testing.assert_array_equal(result.array, mask * lower)
    assert isinstance(evaluate(lambda w: w * 0.0, weight(mask)), Independent)

"""Counting in mean field: exact without padding, and with it the mean over the positions.

Its sums are held in fixed point, of which is lost what is below about 2^-34 of a layer's largest
product, so that against float32's own rounding of 2^-24 it has no say but far below the largest
entry of a gradient.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import dpai_jax as dpai
from dpai_jax.paths.counting import COUNTINGS
from dpai_jax.paths.rules.windows import coverage
from tests.support.networks import by_name
from tests.support.networks.linen_images import BasicBlock, ResNet
from tests.support.networks.linen_tokens import VisionTransformer
from tests.support.reference import quick_compilation

Shapes = dict[str, tuple[int, ...]]
Arrays = list[np.ndarray]


def traced(fn: Any, shapes: Shapes, shape: Sequence[int], **options: Any) -> dpai.Network:
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    return dpai.trace(fn, params, jax.ShapeDtypeStruct(tuple(shape), jnp.float32), **options)


def counting(net: dpai.Network, how: str) -> Callable[[Arrays], tuple[float, Arrays]]:
    """log R_P and its gradient, for the layers' masks."""
    count = jax.value_and_grad(functools.partial(net.log_count, counting=COUNTINGS[how]))
    compiled = jax.jit(count, compiler_options=quick_compilation())

    def run(masks: Arrays) -> tuple[float, Arrays]:
        value, gradient = compiled([jnp.asarray(m, jnp.float32) for m in masks])
        return float(value), [np.asarray(g, np.float64) for g in gradient]

    return run


def assert_same_counts(actual: tuple[float, Arrays], expected: tuple[float, Arrays]) -> None:
    assert actual[0] == pytest.approx(expected[0], rel=2**-22, abs=1e-5)
    for a, b in zip(actual[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 2**-30 * b.max())


def binary_masks(net: dpai.Network, density: float, rng: np.random.Generator) -> Arrays:
    return [rng.random(layer.shape) < density for layer in net.layers]


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of inner ones too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from equations(getattr(inner, "jaxpr", inner))


# Networks of the zoo without padding.
#
# The two ways of counting part only where a uniform axis meets a window of which a tap leaves the
# map, zeros put around it, or something free of paths put beside it. So exact are the counts of all
# networks but those with padded convolutions or pooling (the residual and mobile ones, U-Net, the
# autoencoders, causal convolutions in Mamba and WaveNet) and those with a class token. Here is one
# for each kind of layer that they have; other libraries write the same layers.
EXACT = (
    "linen/weight_norm",
    "nnx/soft_mixture_of_experts",
    "haiku/layer_stack",
    "equinox/gru",
    # Heads, queries shared by groups, a mask.
    "plain/library_attention",
    # A whole decoder, with rotations that stack even and odd features.
    "plain/grouped_query_decoder",
    "plain/patch_embedding",
    # Tokens rolled: two parts of one value, put together again.
    "plain/token_shift",
    # Counts that grow along the tokens.
    "plain/gated_cumulative_sum",
    "plain/indexed_layers",
    # A kernel over the tokens, and one for each of them.
    "plain/layer_kinds",
    "plain/two_inputs_two_outputs",
)


@pytest.mark.parametrize("name", EXACT)
def test_the_count_is_exact_where_nothing_is_padded(name: str) -> None:
    fn, params, x = by_name(name).make()
    used = {eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(params, x).jaxpr)}
    assert not used & {"conv_general_dilated", "pad", "reduce_window_max", "reduce_window_sum"}
    net = dpai.trace(fn, params, x, gates="jacobian")
    mean_field, exact = counting(net, "mean_field"), counting(net, "exact")
    for seed, density in enumerate((1.0, 0.6, 0.3, 0.1)):
        masks = binary_masks(net, density, np.random.default_rng(seed))
        expected = exact(masks)
        if np.isfinite(expected[0]):
            assert_same_counts(mean_field(masks), expected)
        else:
            value, gradient = mean_field(masks)
            assert value == -np.inf
            for g, reference in zip(gradient, expected[1], strict=True):
                np.testing.assert_array_equal(g > 0, reference > 0)


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ kernel)


def valid_convolutions(p: Any, x: jax.Array) -> jax.Array:
    """Strides, dilation, groups, pooling and cropping, none of which leaves the map."""
    numbers = ("NHWC", "HWIO", "NHWC")
    conv = functools.partial(lax.conv_general_dilated, dimension_numbers=numbers)
    x = jax.nn.relu(conv(x, p["strided"], (2, 1), "VALID"))
    x = jax.nn.relu(conv(x, p["dilated"], (1, 1), "VALID", rhs_dilation=(1, 2)))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(conv(x, p["grouped"], (1, 1), ((0, -1), (0, 0)), feature_group_count=2))
    return x.reshape(x.shape[0], -1) @ p["head"]


def stacked_steps(p: Any, x: jax.Array) -> jax.Array:
    """Steps of a recurrence side by side, each with another count; a kernel reads them all."""
    first = dense(x, p["first"])
    second = dense(first, p["again"])
    steps = jnp.stack([first, second, first + dense(second, p["again"])], axis=1)
    both = jnp.concatenate([x[:, :1] @ p["one"], jnp.tanh(x) @ p["other"]], axis=-1)
    return jnp.einsum("btd,tde->be", steps, p["read"]) + both @ p["both"]


UNPADDED: dict[Any, tuple[Shapes, tuple[int, ...]]] = {
    valid_convolutions: (
        {
            "strided": (3, 2, 3, 4),
            "dilated": (2, 3, 4, 6),
            "grouped": (2, 2, 3, 4),
            "head": (16, 3),
        },
        (2, 17, 15, 3),
    ),
    stacked_steps: (
        {
            "first": (5, 4),
            "again": (4, 4),
            "read": (3, 4, 3),
            "one": (1, 1),
            "other": (5, 1),
            "both": (2, 3),
        },
        (2, 5),
    ),
}


@pytest.mark.parametrize("fn", UNPADDED, ids=lambda fn: fn.__name__)
def test_layers_that_keep_counts_uniform_or_read_them_one_by_one_are_exact(fn: Any) -> None:
    net = traced(fn, *UNPADDED[fn])
    mean_field, exact = counting(net, "mean_field"), counting(net, "exact")
    for seed, density in enumerate((1.0, 0.7, 0.4)):
        masks = binary_masks(net, density, np.random.default_rng(seed))
        assert_same_counts(mean_field(masks), exact(masks))


@given(st.floats(0.1, 2.5), st.sampled_from([1e-6, 1.0, 1e4, 1e9]), st.integers(0, 2**32 - 1))
def test_masks_may_hold_strengths_of_any_size(spread: float, scale: float, seed: int) -> None:
    mean_field, exact = mlp_counts()
    rng = np.random.default_rng(seed)
    # Weights of magnitudes far apart, as SynFlow counts them, a third of them pruned.
    masks = [
        scale * np.exp(spread * rng.standard_normal(shape)) * (rng.random(shape) < 0.67)
        for shape in ((6, 30), (30, 40), (40, 5))
    ]
    assert_same_counts(mean_field(masks), exact(masks))


@functools.cache
def mlp_counts() -> list[Callable[[Arrays], tuple[float, Arrays]]]:
    shapes: Shapes = {"1": (6, 30), "2": (30, 40), "3": (40, 5)}
    net = traced(lambda p, x: dense(dense(x, p["1"]), p["2"]) @ p["3"], shapes, (2, 6))
    return [counting(net, how) for how in ("mean_field", "exact")]


# Windows, written out: the map with its zeros between and around the entries, and each tap's view.


@dataclass(frozen=True)
class Window:
    """One axis of a window: its taps and how it goes over the map."""

    taps: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    base: int = 1
    dilation: int = 1


def written_out(x: np.ndarray, axis: int, low: int, high: int, base: int) -> np.ndarray:
    """A map with zeros between its entries along an axis and around them, or cropped."""
    x = np.moveaxis(x, axis, 0)
    between = np.zeros(((len(x) - 1) * base + 1, *x.shape[1:]))
    between[::base] = x
    around = [(max(low, 0), max(high, 0))] + [(0, 0)] * (x.ndim - 1)
    padded = np.pad(between, around)
    return np.moveaxis(padded[max(-low, 0) : len(padded) - max(-high, 0)], 0, axis)


def views(x: np.ndarray, axis: int, window: Window) -> np.ndarray:
    """What each tap sees at each position: positions along the axis, taps along a new last one."""
    x = np.moveaxis(written_out(x, axis, *window.padding, window.base), axis, 0)
    reach = (window.taps - 1) * window.dilation
    each = [
        x[t * window.dilation : len(x) - reach + t * window.dilation : window.stride]
        for t in range(window.taps)
    ]
    return np.moveaxis(np.stack(each, -1), 0, axis)


def convolved(x: np.ndarray, kernel: np.ndarray, windows: Sequence[Window], groups: int = 1) -> Any:
    """A convolution of (positions..., features) with (taps..., inputs, outputs), in float64."""
    for axis, window in enumerate(windows):
        x = views(x, axis, window)
    n, (inputs, outputs) = len(windows), kernel.shape[-2:]
    kernel = np.moveaxis(kernel, -2, 0)
    results = []
    for g in range(groups):
        seen = x[(slice(None),) * n + (slice(g * inputs, (g + 1) * inputs),)]
        of_group = kernel[..., g * outputs // groups : (g + 1) * outputs // groups]
        results.append(np.tensordot(seen, of_group, n + 1))
    return np.concatenate(results, -1)


windows_of_any_kind = st.builds(
    Window,
    taps=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.tuples(st.integers(-2, 4), st.integers(-2, 4)),
    base=st.integers(1, 3),
    dilation=st.integers(1, 3),
)


@given(st.integers(1, 7), windows_of_any_kind)
def test_coverage_is_how_often_each_tap_lies_on_an_entry(size: int, window: Window) -> None:
    padded = (size - 1) * window.base + 1 + sum(window.padding)
    outputs = max(0, (padded - (window.taps - 1) * window.dilation - 1) // window.stride + 1)
    actual = coverage(
        size,
        window.taps,
        outputs,
        window.stride,
        window.padding,
        window.base,
        window.dilation,
    )
    assert actual.shape == (window.taps,)
    if outputs:
        expected = views(np.ones(size), 0, window)
        assert len(expected) == outputs
        np.testing.assert_allclose(actual, expected.mean(0), rtol=1e-6)
    else:
        np.testing.assert_array_equal(actual, 0)


# Layers that break uniformity, each twice, so that the second one sees the mean of the first.


@dataclass(frozen=True)
class Layer:
    """A layer as JAX runs it, `apply(x, kernel)`, and as what it makes of a written-out map."""

    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    apply: Callable[[jax.Array, jax.Array], jax.Array]
    slow: Callable[[np.ndarray, np.ndarray], np.ndarray]


def convolution(
    shape: tuple[int, ...], features: int, windows: Sequence[Window], groups: int = 1
) -> Layer:
    n = len(windows)
    space = "DHW"[-n:]

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            [w.stride for w in windows],
            [w.padding for w in windows],
            [w.base for w in windows],
            [w.dilation for w in windows],
            (f"N{space}C", f"{space}IO", f"N{space}C"),
            groups,
        )

    kernel = (*(w.taps for w in windows), features // groups, features)
    return Layer((*shape, features), kernel, apply, lambda x, k: convolved(x, k, windows, groups))


def pooled(windows: Sequence[Window], reduce: str) -> Layer:
    """A pointwise convolution, then pooling."""

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        start, combine = (-jnp.inf, lax.max) if reduce == "max" else (0.0, lax.add)
        one = Window(1)
        both = [one, *windows, one]
        return lax.reduce_window(
            x @ kernel,
            start,
            combine,
            [w.taps for w in both],
            [w.stride for w in both],
            [w.padding for w in both],
            [w.base for w in both],
            [w.dilation for w in both],
        )

    def slow(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        x = x @ kernel
        for axis, window in enumerate(windows):
            x = views(x, axis, window).sum(-1)
        return x

    return Layer((7, 6, 3), (3, 3), apply, slow)


def padded(config: Sequence[tuple[int, int, int]]) -> Layer:
    """Zeros put around and between, then a convolution that stays inside."""
    inside = [Window(3), Window(2)]
    rest = convolution((6, 7), 3, inside)

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        none = (0, 0, 0)
        return rest.apply(lax.pad(x, jnp.float32(0), [none, *config, none]), kernel)

    def slow(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        for axis, (low, high, interior) in enumerate(config):
            x = written_out(x, axis, low, high, interior + 1)
        # The padding is a layer of its own, whose mean stands for all positions.
        x = np.broadcast_to(x.mean((0, 1)), x.shape)
        return convolved(x, kernel, inside)

    return Layer(rest.shape, rest.kernel, apply, slow)


def transposed(padding: str, taps: tuple[int, int], strides: tuple[int, int]) -> Layer:
    """`lax.conv_transpose`, whose padding is worked out as its documentation says."""

    def window(k: int, s: int) -> Window:
        if padding == "SAME":
            low = k - 1 if s > k - 1 else math.ceil((k + s - 2) / 2)
            return Window(k, 1, (low, k + s - 2 - low), s)
        return Window(k, 1, (k - 1, k - 1 + max(s - k, 0)), s)

    windows = [window(k, s) for k, s in zip(taps, strides, strict=True)]

    def apply(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_transpose(x, kernel, strides, padding)

    return Layer((4, 3, 3), (*taps, 3, 3), apply, lambda x, k: convolved(x, k, windows))


SAME = Window(3, 1, (1, 1))
LAYERS = {
    "same": convolution((5, 6), 3, [SAME, SAME]),
    "pointwise with padding": convolution((5, 6), 3, [Window(1, 1, (1, 0)), Window(1, 1, (2, 2))]),
    "strided": convolution((8, 9), 3, [Window(3, 2, (0, 1)), Window(3, 2, (1, 1))]),
    "even": convolution((5, 6), 3, [Window(2, 1, (0, 1)), Window(4, 1, (1, 2))]),
    "cropped": convolution((9, 9), 3, [Window(2, 1, (-1, 1)), Window(3, 1, (1, -2))]),
    "dilated": convolution((8, 7), 3, [Window(3, 1, (2, 2), 1, 2), Window(2, 1, (3, 0), 1, 3)]),
    "wider than the map": convolution((3, 2), 3, [Window(7, 1, (3, 3)), Window(5, 1, (2, 2))]),
    "grouped": convolution((5, 6), 4, [SAME, SAME], groups=2),
    "depthwise": convolution((5, 6), 3, [SAME, SAME], groups=3),
    "causal": convolution((9,), 3, [Window(3, 1, (4, 0), 1, 2)]),
    "volume": convolution((4, 3, 5), 2, [SAME, Window(2, 1, (1, 0)), SAME]),
    "base-dilated": convolution((4, 3), 3, [Window(3, 2, (2, 1), 3), Window(2, 1, (1, 1), 2)]),
    "transposed same": transposed("SAME", (4, 3), (2, 2)),
    "transposed valid": transposed("VALID", (2, 3), (3, 2)),
    "explicit padding": padded([(1, 2, 0), (0, 3, 0)]),
    "explicit padding between": padded([(1, 1, 1), (0, 1, 2)]),
    "average pooling": pooled([Window(3, 2, (1, 1)), Window(2, 2, (0, 0))], "sum"),
    "max pooling": pooled([Window(3, 1, (1, 1)), Window(2, 1, (1, 0), 1, 2)], "max"),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_layers_that_break_uniformity_count_by_the_mean_over_their_positions(layer: Layer) -> None:
    shapes: Shapes = {"first": layer.kernel, "second": layer.kernel}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return layer.apply(jax.nn.relu(layer.apply(x, params["first"])), params["second"])

    def mean_paths(first: np.ndarray, second: np.ndarray) -> float:
        y = layer.slow(np.ones(layer.shape), first)
        positions = tuple(range(y.ndim - 1))
        return float(layer.slow(np.broadcast_to(y.mean(positions), y.shape), second).sum())

    rng = np.random.default_rng(0)
    masks = [rng.uniform(0.2, 3.0, s) * (rng.random(s) < 0.7) for s in shapes.values()]
    value, gradient = counting(traced(fn, shapes, (1, *layer.shape)), "mean_field")(masks)
    paths = mean_paths(*masks)
    assert value == pytest.approx(np.log(paths), abs=1e-5)
    # Paths are linear in each kernel, so differences are derivatives.
    for which in (0, 1):
        for _ in range(6):
            at = tuple(rng.integers(n) for n in layer.kernel)
            more = [m.copy() for m in masks]
            more[which][at] += 1
            expected = (mean_paths(*more) - paths) / paths
            assert gradient[which][at] == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in LAYERS if "explicit" not in name])
def test_of_one_layer_the_mean_over_the_positions_is_exact(name: str) -> None:
    layer = LAYERS[name]
    shapes: Shapes = {"kernel": layer.kernel}
    net = traced(lambda p, x: layer.apply(x, p["kernel"]), shapes, (2, *layer.shape))
    mask = np.random.default_rng(0).random(layer.kernel) < 0.6
    assert_same_counts(counting(net, "mean_field")([mask]), counting(net, "exact")([mask]))


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_token_without_paths_dilutes_the_others(place: str) -> None:
    """With N tokens and a class token, what a token holds is N / (N + 1) of theirs."""
    shapes: Shapes = {"patches": (3, 4), "mlp": (4, 4), "head": (4, 2), "cls": (1, 1, 4)}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        tokens = [jnp.broadcast_to(params["cls"], (x.shape[0], 1, 4)), x @ params["patches"]]
        x = jnp.concatenate(tokens if place == "first" else tokens[::-1], axis=1)
        return jnp.tanh(x @ params["mlp"])[:, 0] @ params["head"]

    net = traced(fn, shapes, (2, 7, 3))
    assert [layer.name for layer in net.layers] == ["patches", "mlp", "head"]
    rng = np.random.default_rng(0)
    masks = [(rng.random(layer.shape) < 0.7).astype(float) for layer in net.layers]
    value, gradient = counting(net, "mean_field")(masks)
    patches, mlp, head = masks
    paths = 2 * 7 / 8 * float(np.sum(np.ones(3) @ patches @ mlp @ head))
    assert value == pytest.approx(np.log(paths), abs=1e-5)
    # One image has the paths; another would double both them and their derivative.
    expected = np.outer(np.ones(3), (mlp @ head).sum(1)) * 2 * 7 / 8 / paths
    np.testing.assert_allclose(gradient[0], expected, rtol=1e-5)


# The cost.


def vision_transformer(resolution: int) -> tuple[Any, tuple[int, ...]]:
    return VisionTransformer(depth=1), (2, resolution, resolution, 3)


def residual_network(resolution: int) -> tuple[Any, tuple[int, ...]]:
    return ResNet(functools.partial(BasicBlock)), (2, resolution, resolution, 3)


@pytest.mark.parametrize("make", [residual_network, vision_transformer])
def test_the_cost_is_that_of_the_weights_whatever_the_resolution(make: Any) -> None:
    computed = {}
    for resolution in (32, 64):
        module, shape = make(resolution)
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        init = functools.partial(module.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), x)
        net = dpai.trace(functools.partial(module.apply, train=False), variables, x)
        masks = [jax.ShapeDtypeStruct(layer.shape, jnp.float32) for layer in net.layers]
        for how in ("mean_field", "exact"):
            count = jax.value_and_grad(functools.partial(net.log_count, counting=COUNTINGS[how]))
            jaxpr = jax.make_jaxpr(count)(masks).jaxpr
            computed[resolution, how] = [
                (eqn.primitive.name, *(v.aval.shape for v in eqn.outvars))
                for eqn in equations(jaxpr)
            ]
    assert computed[32, "mean_field"] == computed[64, "mean_field"]
    assert "conv_general_dilated" not in {name for name, *_ in computed[64, "mean_field"]}
    assert computed[32, "exact"] != computed[64, "exact"]


def tied(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"].T


def in_heads(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("nab,abo->no", x, p["w"].reshape(600, 20, 20).transpose(1, 2, 0))


@pytest.mark.parametrize(("fn", "features"), [(tied, (400,)), (in_heads, (20, 20))])
def test_a_transposed_kernel_is_summed_as_it_lies_in_memory(fn: Any, features: Any) -> None:
    """As an embedding that is used again at the output. To copy it would take most of a step."""
    net = dpai.trace(fn, {"w": jnp.ones((600, 400))}, jnp.ones((1, *features)))
    mask = np.random.default_rng(0).random((600, 400)) < 0.5
    kept = {"w": jnp.asarray(mask, jnp.float32)}
    count = jax.value_and_grad(lambda masks: dpai.log_paths(net, masks, "mean_field"))
    compiled = jax.jit(count).lower(kept).compile()
    lines = compiled.as_text().splitlines()
    assert [line for line in lines if "600" in line]
    assert not [line for line in lines if "600" in line and " copy(" in line]
    found, gradient = compiled(kept)
    np.testing.assert_allclose(found, np.log(mask.sum()), rtol=1e-6)
    np.testing.assert_allclose(gradient["w"], np.full(mask.shape, 1 / mask.sum()), rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_paths_that_are_missing_are_finite_however_many_they_would_be(gated: bool) -> None:
    """Behind a first layer without weights 64^29 paths are missing for each of them: 2^174."""
    depth, width = 30, 64

    def fn(params: Any, x: jax.Array) -> jax.Array:
        x = x @ params["w00"]
        for i in range(1, depth):
            y = jax.nn.relu(x @ params[f"w{i:02}"])
            x = y * jax.nn.sigmoid(x) if gated else y
        return x

    net = traced(fn, {f"w{i:02}": (width, width) for i in range(depth)}, (1, width))
    masks = [np.zeros((width, width)), *[np.ones((width, width))] * (depth - 1)]
    count, (first, *others) = counting(net, "mean_field")(masks)
    assert count == -math.inf
    assert np.all(np.isfinite(first))
    assert np.all(first > 0)
    # These would need another weight before them.
    assert not np.any(others)


@pytest.mark.parametrize("counting_", ["mean", "Exact", "", None, 3])
def test_an_unknown_way_of_counting_is_refused(counting_: Any) -> None:
    net = traced(lambda p, x: x @ p["kernel"], {"kernel": (3, 2)}, (1, 3))
    message = f"counting must be one of exact, mean_field, got {counting_!r}"
    with pytest.raises(ValueError, match=message):
        dpai.log_paths(net, {"kernel": np.ones((3, 2))}, counting=counting_)

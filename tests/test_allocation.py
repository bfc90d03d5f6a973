"""How the weights to keep are shared out over layers. Only shapes are traced, nothing computed."""

import math
from decimal import ROUND_HALF_EVEN, Decimal
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jax import lax

import dpai_jax as dpai
from dpai_jax.allocation import apportion

SPARSITIES = (0, 0.1, 0.5, 0.9, 0.98, 0.99, 0.999)


def shapes(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def network(kernels):
    """A network of one branch for each kernel, `(in, out)` or `(*taps, in, out)`."""

    def branch(kernel, x):
        if kernel.ndim == 2:
            return x @ kernel
        order = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
        return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=order)

    params = [shapes(*kernel) for kernel in kernels]
    inputs = [shapes(1, *kernel[:-1]) for kernel in kernels]
    return dpai.trace(lambda params, x: list(map(branch, params, x)), params, inputs)


def resnet20():
    """Kernels of the CIFAR-10 network of 16, 32 and 64 channels, its two shortcuts projected."""
    kernels = [(3, 3, 3, 16)]
    for inputs, outputs in pairwise((16, 16, 32, 64)):
        kernels += [(3, 3, inputs, outputs)] + [(3, 3, outputs, outputs)] * 5
    return [*kernels, (1, 1, 16, 32), (1, 1, 32, 64), (64, 10)]


def resnet50():
    """Kernels of the ImageNet network."""
    kernels, inputs = [(7, 7, 3, 64)], 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        kernels.append((1, 1, inputs, 4 * width))
        for _ in range(blocks):
            kernels += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            inputs = 4 * width
    return [*kernels, (inputs, 1000)]


def asked(sparsity, size):
    kept = (1 - Decimal(repr(float(sparsity)))) * size
    return int(kept.quantize(Decimal(1), ROUND_HALF_EVEN))


def erk_shares(kernels):
    return [float(sum(kernel)) for kernel in kernels]


def bisected(total, shares, sizes):
    """The parts `min(size, scale·share)` that sum to the total, the scale by bisection."""
    shares, sizes = np.asarray(shares, np.float64), np.asarray(sizes, np.float64)
    low, high = 0.0, float(np.max(sizes / shares))
    for _ in range(200):
        middle = (low + high) / 2
        too_few = np.minimum(sizes, middle * shares).sum() < total
        low, high = (middle, high) if too_few else (low, middle)
    return np.minimum(sizes, high * shares)


def assert_rounded(parts, ideal):
    """Each part is its ideal rounded, but for the small ones, which are lifted to one."""
    lifted = np.sum(np.maximum(1 - ideal, 0))
    small = ideal < 1
    assert np.all(np.asarray(parts)[small] == 1)
    slack = 1 + math.ceil(lifted) + 1e-9 * ideal
    assert np.all(np.abs(parts - ideal)[~small] <= slack[~small])
    if lifted == 0:
        assert np.all(np.abs(parts - ideal) < 1 + 1e-9 * ideal)


@st.composite
def problems(draw):
    sizes = draw(st.lists(st.integers(1, 10**8), min_size=1, max_size=12))
    shares = draw(st.lists(st.integers(1, 10**5), min_size=len(sizes), max_size=len(sizes)))
    return draw(st.integers(len(sizes), sum(sizes))), shares, sizes


@given(problems())
def test_parts_sum_to_the_total_and_stay_between_one_and_their_size(problem):
    total, shares, sizes = problem
    parts = apportion(total, shares, sizes)
    assert sum(parts) == total
    assert all(1 <= part <= size for part, size in zip(parts, sizes, strict=True))
    assert_rounded(np.asarray(parts, np.float64), bisected(total, shares, sizes))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.data())
def test_small_problems_have_no_better_division(sizes, data):
    # Moving one weight between any two parts never comes nearer to the proportional division.
    total = data.draw(st.integers(len(sizes), sum(sizes)))
    parts = np.asarray(apportion(total, [1] * len(sizes), sizes), np.float64)
    ideal = bisected(total, [1] * len(sizes), sizes)
    assume(np.all(ideal >= 1))
    distance = np.sum((parts - ideal) ** 2)
    for i in range(len(sizes)):
        for j in range(len(sizes)):
            moved = parts.copy()
            moved[i] += 1
            moved[j] -= 1
            if moved[i] <= sizes[i] and moved[j] >= 1:
                assert np.sum((moved - ideal) ** 2) >= distance - 1e-6


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40))
        | st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
        min_size=1,
        max_size=6,
    ),
    st.floats(0, 1, exclude_max=True),
)
def test_any_network_keeps_exactly_what_is_asked(kernels, sparsity):
    sizes = [math.prod(kernel) for kernel in kernels]
    assume(asked(sparsity, sum(sizes)) >= len(kernels))
    net = network(kernels)
    for allocation in (dpai.erk, dpai.er, dpai.uniform):
        keep = allocation(net, sparsity)
        assert all(type(kept) is int for kept in keep)
        assert sum(keep) == asked(sparsity, sum(sizes))
        assert all(1 <= kept <= size for kept, size in zip(keep, sizes, strict=True))


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_resnet20_gets_the_densities_of_the_rule(sparsity):
    kernels = resnet20()
    net = network(kernels)
    assert net.size == 270_896
    keep = dpai.erk(net, sparsity)
    assert sum(keep) == asked(sparsity, 270_896)
    sizes = [math.prod(kernel) for kernel in kernels]
    assert_rounded(np.asarray(keep, float), bisected(sum(keep), erk_shares(kernels), sizes))


def test_resnet20_at_ninety_percent_keeps_two_small_layers_whole():
    kernels = resnet20()
    keep = dict(zip(kernels, dpai.erk(network(kernels), 0.9), strict=True))
    full = {kernel for kernel, kept in keep.items() if kept == math.prod(kernel)}
    assert full == {(1, 1, 16, 32), (64, 10)}
    # What the other twenty share, 27090 - 512 - 640, in proportion to the sums of their axes.
    scale = (27_090 - 512 - 640) / sum(sum(kernel) for kernel in kernels if kernel not in full)
    assert keep[3, 3, 3, 16] == pytest.approx(scale * 25, abs=1)
    assert keep[3, 3, 64, 64] == pytest.approx(scale * 134, abs=1)


@pytest.mark.parametrize("sparsity", [0.9, 0.97])
def test_density_is_proportional_to_sum_over_product_of_the_axes(sparsity):
    kernels = [(3, 3, 256, 512), (1, 7, 300, 200), (5, 5, 64, 128), (2048, 1024), (700, 900)]
    keep = np.asarray(dpai.erk(network(kernels), sparsity))
    sizes = np.asarray([math.prod(kernel) for kernel in kernels])
    assert np.all(keep < sizes)
    scale = (keep / sizes) / (np.asarray(erk_shares(kernels)) / sizes)
    np.testing.assert_allclose(scale, scale.mean(), rtol=1e-3)


@pytest.mark.parametrize("sparsity", [0.9, 0.97])
def test_the_rule_without_kernels_leaves_the_taps_out(sparsity):
    kernels = [(3, 3, 256, 512), (1, 7, 300, 200), (5, 5, 64, 128), (2048, 1024), (700, 900)]
    keep = np.asarray(dpai.er(network(kernels), sparsity))
    sizes = np.asarray([math.prod(kernel) for kernel in kernels])
    assert np.all(keep < sizes)
    rule = np.asarray([(a + b) / (a * b) for *_, a, b in kernels])
    scale = (keep / sizes) / rule
    np.testing.assert_allclose(scale, scale.mean(), rtol=1e-3)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_uniform_gives_every_layer_one_density(sparsity):
    kernels = resnet20()
    keep = np.asarray(dpai.uniform(network(kernels), sparsity))
    sizes = np.asarray([math.prod(kernel) for kernel in kernels])
    assert np.all(np.abs(keep - sizes * asked(sparsity, 270_896) / 270_896) < 1)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_networks_of_25_million_weights_are_exact(sparsity):
    # Beyond 2^24 float32 cannot hold every integer.
    net = network(resnet50())
    assert net.size == 25_502_912
    for allocation in (dpai.erk, dpai.uniform):
        assert sum(allocation(net, sparsity)) == asked(sparsity, 25_502_912)
    odd = network([(5001, 5003)])
    assert dpai.erk(odd, sparsity) == [asked(sparsity, 25_020_003)]


def test_heads_of_an_attention_kernel_are_one_features_axis():
    def attend(params, x):
        heads = jnp.einsum("bd,dhk->bhk", x, params["query"])
        return jnp.einsum("bhk,hkd->bd", heads, params["out"]) @ params["head"]

    def dense(params, x):
        return x @ params["query"] @ params["out"] @ params["head"]

    head = shapes(768, 10)
    attention = {"query": shapes(768, 12, 64), "out": shapes(12, 64, 768), "head": head}
    matrices = {"query": shapes(768, 768), "out": shapes(768, 768), "head": head}
    keep = dpai.erk(dpai.trace(attend, attention, shapes(1, 768)), 0.95)
    assert keep == dpai.erk(dpai.trace(dense, matrices, shapes(1, 768)), 0.95)


def test_leaves_that_are_not_prunable_keep_nothing():
    params = {"kernel": shapes(8, 8), "bias": shapes(8)}
    net = dpai.trace(lambda p, x: x @ p["kernel"] + p["bias"][None], params, shapes(1, 8))
    assert dpai.erk(net, 0.5) == {"kernel": 32, "bias": 0}


def scanned_and_unrolled():
    """One residual network of three blocks, its kernels stacked and apart."""

    def block(x, p):
        return x + jax.nn.relu(x @ p["up"]) @ p["down"]

    def scanned(params, x):
        x, _ = lax.scan(lambda x, p: (block(x, p), None), x, params["blocks"])
        return x @ params["head"]

    def unrolled(params, x):
        for p in params["blocks"]:
            x = block(x, p)
        return x @ params["head"]

    stacked = {"up": shapes(3, 30, 50), "down": shapes(3, 50, 30)}
    single = {"up": shapes(30, 50), "down": shapes(50, 30)}
    head = shapes(30, 7)
    return (
        dpai.trace(scanned, {"blocks": stacked, "head": head}, shapes(1, 30)),
        dpai.trace(unrolled, {"blocks": [single] * 3, "head": head}, shapes(1, 30)),
    )


@pytest.mark.parametrize("allocation", [dpai.erk, dpai.uniform])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.95])
def test_stacked_layers_get_one_number_each_those_of_the_layers_apart(allocation, sparsity):
    stacked, apart = (allocation(net, sparsity) for net in scanned_and_unrolled())
    assert stacked["head"] == apart["head"]
    total = stacked["head"]
    for name in ("up", "down"):
        kept = stacked["blocks"][name]
        assert kept.shape == (3, 1, 1)
        assert np.issubdtype(kept.dtype, np.integer)
        # Equal shares are rounded in the order of the layers, which may differ by one.
        each = [block[name] for block in apart["blocks"]]
        np.testing.assert_allclose(kept.ravel(), each, atol=1)
        total += kept.sum()
    assert total == asked(sparsity, 3 * 2 * 1500 + 210)


def test_copies_along_a_middle_axis_get_one_number_each():
    def fn(params, x):
        kernels = jnp.moveaxis(params["hidden"], 1, 0)
        x, _ = lax.scan(lambda x, kernel: (jax.nn.relu(x @ kernel), None), x, kernels)
        return x @ params["head"]

    params = {"hidden": shapes(20, 3, 20), "head": shapes(20, 5)}
    keep = dpai.erk(dpai.trace(fn, params, shapes(1, 20)), 0.5)
    assert keep["hidden"].shape == (1, 3, 1)
    assert keep["hidden"].sum() + keep["head"] == (3 * 400 + 100) // 2


def test_copies_along_two_axes_get_one_number_each():
    def layer(x, kernel):
        return jax.nn.relu(x @ kernel), None

    def fn(params, x):
        x, _ = lax.scan(lambda x, k: (lax.scan(layer, x, k)[0], None), x, params["hidden"])
        return x @ params["head"]

    params = {"hidden": shapes(2, 3, 20, 20), "head": shapes(20, 5)}
    keep = dpai.erk(dpai.trace(fn, params, shapes(1, 20)), 0.5)
    assert keep["hidden"].shape == (2, 3, 1, 1)
    assert np.ptp(keep["hidden"]) <= 1
    assert keep["hidden"].sum() + keep["head"] == (6 * 400 + 100) // 2


@pytest.mark.parametrize("sparsity", [-0.1, -1e-9, 1, 1.5, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("allocation", [dpai.erk, dpai.uniform])
def test_sparsity_outside_zero_to_one_is_refused(allocation, sparsity):
    with pytest.raises(ValueError, match=rf"sparsity must .*\[0, 1\), got {sparsity}"):
        allocation(network([(8, 8)]), sparsity)


@pytest.mark.parametrize("sparsity", ["0.5", None, [0.5]])
def test_a_sparsity_that_is_no_number_is_refused(sparsity):
    with pytest.raises((TypeError, ValueError), match="sparsity must be"):
        dpai.erk(network([(8, 8)]), sparsity)


@pytest.mark.parametrize("allocation", [dpai.erk, dpai.uniform])
def test_fewer_weights_than_layers_are_refused(allocation):
    net = network([(8, 8), (8, 8), (8, 8)])
    assert allocation(net, 1 - 3 / 192) == [1, 1, 1]
    with pytest.raises(ValueError, match=r"keeps 2 of 192 weights, fewer than .* layers \(3\)"):
        allocation(net, 1 - 2 / 192)


def test_each_copy_of_a_stacked_layer_counts_as_a_layer():
    net, _ = scanned_and_unrolled()
    with pytest.raises(ValueError, match=r"fewer than .* layers \(7\)"):
        dpai.erk(net, 1 - 6 / net.size)

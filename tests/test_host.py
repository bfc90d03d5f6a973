"""What NumPy runs, held bit by bit against XLA; and which calls it runs."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from jax import lax

import dpai_jax as dpai
from dpai_jax import checks, measuring
from dpai_jax.methods import saliency
from dpai_jax.selection import select, select_by_numpy
from dpai_jax.tools import host, meshes
from dpai_jax.tools.host.floats import as_xla, flushes
from dpai_jax.tools.host.plan import Plan, UnknownError
from dpai_jax.tools.powers import logarithm
from dpai_jax.tools.sums import product_sum, scaled, sum_below_one, totals, written_out
from experiments import models

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="elsewhere every program is compiled",
)


def by_numpy(fn: Callable[..., Any], *args: Any) -> list[np.ndarray]:
    plan = Plan(jax.make_jaxpr(fn)(*args))
    with as_xla():
        found = plan(*[np.asarray(x)[()] for x in jax.tree.leaves(args)])
    return list(map(np.asarray, found))


def assert_alike(fn: Callable[..., Any], *args: Any) -> None:
    """NumPy's results are XLA's, to the last bit and the sign of zero."""
    pairs = zip(by_numpy(fn, *args), jax.tree.leaves(jax.jit(fn)(*args)), strict=True)
    for own, theirs in pairs:
        theirs = np.asarray(theirs)
        assert (own.dtype, own.shape) == (theirs.dtype, theirs.shape)
        numbers = own == own
        np.testing.assert_array_equal(numbers, theirs == theirs)
        bits = [x[numbers].tobytes() for x in (own, theirs)]
        assert bits[0] == bits[1]


SMALL = [0.0, -0.0, 2.0**-126, -(2.0**-126), 2.0**-130, 2.0**-100]
LARGE = [3e9, -3e9, 1e38, -1e38, 2.0**31, 2.0**32, -(2.0**31), np.inf, -np.inf, np.nan]
FLOATS = np.array([*SMALL, *LARGE, 1.0, -1.5, 0.1, 2.5, -2.5, 7.0], np.float32)
INTS = np.array([0, 1, -1, 2, 31, 32, 33, -(2**31), 2**31 - 1, 2**30, -7, 100], np.int32)
UINTS = INTS.view(np.uint32)
FLAGS = np.array([True, False, True, True, False])


def pairs_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.meshgrid(values, values)
    return first.ravel(), second.ravel()


TWO_FLOATS = [lax.add, lax.sub, lax.mul, lax.div, lax.max, lax.min, lax.rem]
COMPARISONS = [lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge]
SHIFTS = [lax.shift_left, lax.shift_right_logical, lax.shift_right_arithmetic]
TWO_INTS = [lax.add, lax.sub, lax.mul, lax.max, lax.min, *SHIFTS]
BITS = [lax.bitwise_and, lax.bitwise_or, lax.bitwise_xor]


def named(fn: Any) -> str:
    return str(fn.__name__)


@pytest.mark.parametrize("fn", TWO_FLOATS + COMPARISONS, ids=named)
def test_two_floats(fn: Any) -> None:
    a, b = pairs_of(FLOATS)
    if fn in (lax.max, lax.min):  # which of two zeros is the larger one is not said
        chosen = ~(np.maximum(np.abs(a), np.abs(b)) < 2.0**-126)
        a, b = a[chosen], b[chosen]
    assert_alike(fn, a, b)
    rng = np.random.default_rng(0)
    assert_alike(fn, *(rng.standard_normal((2, 1000)) * 1e-19).astype(np.float32))


@pytest.mark.parametrize("fn", TWO_INTS + COMPARISONS + BITS, ids=named)
@pytest.mark.parametrize("values", [INTS, UINTS], ids=["signed", "unsigned"])
def test_two_integers(fn: Any, values: np.ndarray) -> None:
    assert_alike(fn, *pairs_of(values))


def test_quotients_of_integers() -> None:
    a, b = (x[pairs_of(UINTS)[1] != 0] for x in pairs_of(UINTS))
    assert_alike(lax.div, a, b)
    assert_alike(lax.rem, a, b)


@pytest.mark.parametrize("fn", [*BITS, lax.eq, lax.ne, lax.max, lax.min], ids=named)
def test_two_flags(fn: Any) -> None:
    assert_alike(fn, *pairs_of(FLAGS[:2]))


ONE_FLOAT = {
    "neg": lax.neg,
    "abs": lax.abs,
    "floor": lax.floor,
    "sign": lax.sign,
    "sqrt": lambda x: lax.sqrt(lax.abs(x)),
    "clamp": lambda x: lax.clamp(jnp.float32(-2), x, jnp.float32(2.5)),
    "to signed": lambda x: x.astype(jnp.int32),
    "to unsigned": lambda x: x.astype(jnp.uint32),
    "to flags": lambda x: x.astype(bool),
    "to bits": lambda x: lax.bitcast_convert_type(x, jnp.int32),
    "a choice": lambda x: lax.select(x > 0, x, x * 2),
    "a choice by one": lambda x: lax.select_n(x[0] > 1, x, -x),
}


@pytest.mark.parametrize("fn", ONE_FLOAT.values(), ids=ONE_FLOAT)
def test_one_float(fn: Any) -> None:
    assert_alike(fn, FLOATS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.uint32, bool])
@pytest.mark.parametrize("values", [INTS, UINTS, FLAGS], ids=["signed", "unsigned", "flags"])
def test_integers_become_other_numbers(values: np.ndarray, dtype: Any) -> None:
    assert_alike(lambda x: x.astype(dtype), values)


@pytest.mark.parametrize("exponent", [0, -100, 3, 40_000])
def test_logarithms(exponent: int) -> None:
    x = np.geomspace(2.0**-126, 1e38, 10_000).astype(np.float32)
    assert_alike(logarithm, x, np.int32(exponent))
    exact = np.log(x.astype(np.float64)) + exponent * np.log(2)
    found = np.asarray(logarithm(x, np.int32(exponent)))
    np.testing.assert_allclose(found, exact, rtol=2.0**-22, atol=2.0**-24)
    slopes = jax.vmap(jax.grad(logarithm), (0, None))(x[::100], np.int32(exponent))
    np.testing.assert_allclose(slopes, 1 / x[::100].astype(np.float64), rtol=2.0**-23)


PLACES: dict[str, Callable[[Any], Any]] = {
    "broadcast": lambda x: lax.broadcast_in_dim(x, (2, 4, 3, 5, 6), (1, 3, 4)),
    "reshape": lambda x: x.reshape(6, 20) + x.ravel()[None, :20],
    "reshape in another order": lambda x: lax.reshape(x, (6, 20), (2, 0, 1)),
    "transpose": lambda x: x.transpose(2, 0, 1),
    "rev": lambda x: lax.rev(x, (0, 2)),
    "slice": lambda x: lax.slice(x, (1, 0, 2), (4, 5, 6), (2, 1, 3)),
    "pad nothing": lambda x: lax.pad(x[:0], jnp.float32(7), [(1, 2, 1), (0, 0, 2), (3, 0, 1)]),
    "pad": lambda x: lax.pad(x, jnp.float32(7), [(1, 2, 0), (0, 0, 2), (3, 0, 1)]),
    "concatenate": lambda x: jnp.concatenate([x, x * 2, x[:, :1]], 1),
    "stack": lambda x: jnp.stack([x, -x], 1),
    "split": lambda x: jnp.split(x, [2, 3], 1),
    "iota": lambda x: x + lax.broadcasted_iota(jnp.float32, x.shape, 1),
    "dynamic slice": lambda x: lax.dynamic_slice(x, (x[0, 0, 0].astype(int), 9, -1), (2, 2, 3)),
    "dynamic update": lambda x: lax.dynamic_update_slice(
        x, x[:2, :2], (1, 9, x.astype(int)[0, 0, 0])
    ),
    "gather rows": lambda x: x[jnp.array([2, 0, 2])],
    "gather a column": lambda x: x[:, jnp.array([4, 1]), jnp.array([0, 5])],
    "gather, clipped": lambda x: x.at[jnp.array([9, -9])].get(mode="clip"),
    "squeeze": lambda x: jnp.squeeze(x[:1]) + jnp.expand_dims(x[0, 0], 0),
}


@pytest.mark.parametrize("fn", PLACES.values(), ids=PLACES)
def test_shapes_and_places(fn: Any) -> None:
    assert_alike(fn, np.random.default_rng(0).standard_normal((4, 5, 6), np.float32))


AXES = [(0,), (2,), (0, 1), (1, 2), (0, 1, 2)]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_reductions(axes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    floats = rng.standard_normal((5, 300, 7)).astype(np.float32)
    ints = rng.integers(-(2**31), 2**31, floats.shape).astype(np.int32)
    assert_alike(lambda x: (jnp.max(x, axes), jnp.min(x, axes)), floats)
    assert_alike(lambda x: (jnp.sum(x, axes), jnp.max(x, axes), jnp.min(x, axes)), ints)
    flags = floats > 0
    assert_alike(lambda x: (jnp.any(x, axes), jnp.all(x, axes)), flags)
    assert_alike(lambda x: jnp.sum(x, axes, dtype=jnp.uint32), flags)
    terms = floats / 16
    assert_alike(lambda x: sum_below_one([(x, 1.0), (x[:1], 0.5)], axes), terms)
    assert_alike(lambda x, y: totals([y, y & (x > 0)], axes), terms, flags)
    assert_alike(lambda x: product_sum(x, x[:1], axes), floats)
    assert_alike(lambda x: written_out(x[..., 0]), floats)
    assert_alike(lambda x: written_out(x[..., 0] > 0), floats)


def test_loops_and_branches() -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)

    def doubled(x: Any) -> Any:
        return lax.while_loop(
            lambda s: jnp.max(s[0]) < x[3, 2], lambda s: (s[0] * 2, s[1] + 1), (x[1], 0)
        )

    def scanned(x: Any, reverse: bool) -> Any:
        return lax.scan(lambda s, row: (s * 2 + row[0], (s, row)), x[0, 1], x, reverse=reverse)

    assert_alike(doubled, rows)
    for reverse in (False, True):
        assert_alike(functools.partial(scanned, reverse=reverse), rows)
    branches = [lambda x: x * 2, lambda x: x + 1, lambda x: x[::-1]]
    for index in (-3, 0, 1, 5):
        assert_alike(lambda i, x: lax.switch(i, branches, x), np.int32(index), rows)


WINDOWS = {
    "plain": {},
    "strides": {"window_strides": (2, 3)},
    "padded": {"padding": ((1, 2), (0, 3))},
    "cut off": {"padding": ((-1, 2), (1, -2))},
    "apart": {"lhs_dilation": (2, 3), "padding": ((-1, 2), (-2, 1))},
    "holes": {"rhs_dilation": (2, 1)},
    "groups": {"feature_group_count": 2},
    "depthwise": {"feature_group_count": 4, "window_strides": (2, 2), "padding": ((1, 1), (1, 1))},
}


@pytest.mark.parametrize("settings", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize(
    "layout",
    [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NHWC"), ("NHWC", "HOWI", "NCHW")],
    ids=str,
)
def test_convolutions_of_whole_numbers(settings: dict[str, Any], layout: Any) -> None:
    rng = np.random.default_rng(0)
    sizes = {"N": 2, "C": 4, "H": 7, "W": 9}
    groups = settings.get("feature_group_count", 1)
    of_kernel = {"H": 3, "W": 2, "I": 4 // groups, "O": 8}
    x = rng.integers(-9, 9, [sizes[c] for c in layout[0]]).astype(np.float32)
    kernel = rng.integers(-9, 9, [of_kernel[c] for c in layout[1]]).astype(np.float32)
    full = {"window_strides": (1, 1), "padding": ((0, 0), (0, 0))} | settings
    fn = functools.partial(lax.conv_general_dilated, dimension_numbers=layout, **full)
    assert_alike(fn, x, kernel)
    if groups == 1:  # others would be in groups of the batch
        assert_alike(jax.grad(lambda x, k: jnp.max(fn(x, k)), (0, 1)), x, kernel)


@pytest.mark.parametrize(
    ("a", "b", "numbers"),
    [
        ((3, 4), (4, 5), (((1,), (0,)), ((), ()))),
        ((4, 3, 2), (5, 2, 4), (((0, 2), (2, 1)), ((), ()))),
        ((2, 4, 3), (3, 5, 2), (((2,), (0,)), ((0,), (2,)))),
        ((4,), (4,), (((0,), (0,)), ((), ()))),
        ((4, 2), (3,), (((), ()), ((), ()))),
    ],
)
def test_products_of_matrices_of_whole_numbers(a: Any, b: Any, numbers: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(-9, 9, shape).astype(np.float32) for shape in (a, b))
    assert_alike(functools.partial(lax.dot_general, dimension_numbers=numbers), x, y)


def test_windows() -> None:
    x = np.random.default_rng(0).integers(-9, 9, (2, 8, 9, 3)).astype(np.float32)
    fn = functools.partial(lax.reduce_window, init_value=0.0, computation=lax.add)
    settings = {"window_dimensions": (1, 3, 2, 1), "window_strides": (1, 2, 2, 1)}
    assert_alike(lambda x: fn(x, padding="VALID", **settings), x)
    assert_alike(lambda x: fn(x, padding="SAME", **settings), x)


def test_products_are_rounded_before_they_are_added() -> None:
    """XLA multiplies and adds at once, unless a product is kept apart (`rounded`)."""
    a, b, c = np.random.default_rng(0).standard_normal((3, 4096), np.float32)
    assert_alike(lambda a, b, c: scaled(a, b) + c, a, b, c)
    assert_alike(lambda a, b, c: product_sum(a, b, ()) + c, a, b, c)
    assert_alike(jax.grad(lambda a, b, c: jnp.sum(scaled(a, 0.3)) + jnp.sum(b)), a, b, c)


@pytest.mark.parametrize(
    "fn",
    [
        jnp.exp,
        lambda x: x.astype(jnp.int8),
        jnp.argmax,
        lambda x: jnp.sort(x),
        lambda x: x.at[jnp.array([1, 99])].get(mode="fill"),
        lambda x: jnp.max(x[:0], initial=0.0) if x.ndim else lax.reduce_max(x[:0], axes=(0,)),
    ],
    ids=["exp", "int8", "argmax", "sort", "a gather that fills", "the largest of none"],
)
def test_what_is_not_known_is_refused(fn: Any) -> None:
    with pytest.raises(UnknownError):
        by_numpy(fn, np.ones(5, np.float32))


def _added_and_largest(x: Any) -> list[Any]:
    found: list[Any] = lax.reduce(
        [x, x], [0.0, 0.0], lambda a, b: [a[0] + b[0], jnp.maximum(a[1], b[1])], (0,)
    )
    return found


@pytest.mark.parametrize(
    ("fn", "rounds"),
    [
        (lambda x: jnp.sum(x), True),
        (lambda x: x @ x, True),
        (lambda x: lax.scan(lambda s, row: (s + jnp.sum(row), None), 0.0, x)[0], True),
        (_added_and_largest, True),
        (lambda x: jnp.sum(x > 0), False),
        (lambda x: x[:, :1] @ x[:1], False),
        (lambda x: jnp.sum(x[:1], 0) + jnp.max(x), False),
    ],
)
def test_a_plan_knows_whether_a_sum_of_floats_can_round(fn: Any, rounds: bool) -> None:
    assert Plan(jax.make_jaxpr(fn)(np.ones((3, 3), np.float32))).rounds == rounds


def test_what_nothing_reads_is_not_run() -> None:
    def fn(x: Any) -> Any:
        lax.rem(x, x)
        return x + 1

    assert len(Plan(jax.make_jaxpr(fn)(np.ones(3, np.float32)))._calls) == 1


def test_small_numbers_are_zero_only_within_the_block() -> None:
    assert flushes()
    small = np.full(3, 2.0**-130, np.float32)
    with as_xla():
        assert not np.any(small > 0)
    assert np.all(small > 0)
    with pytest.raises(KeyError), as_xla():
        raise KeyError
    assert np.all(small > 0)


def threads_of_blas() -> set[int]:
    found = threadpoolctl.threadpool_info()
    return {one["num_threads"] for one in found if one["user_api"] == "blas"}


def test_blas_takes_small_numbers_as_zero_in_all_of_a_product() -> None:
    x, y = np.full((256, 256), 2.0**-70, np.float32), np.full((256, 256), 2.0**-60, np.float32)
    with as_xla():
        assert not np.any(x @ y)
    assert np.all(x @ y > 0)


def test_blas_has_its_threads_again_after_the_block() -> None:
    def in_a_block() -> set[int]:
        with as_xla():
            return threads_of_blas()

    before = threads_of_blas()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        with as_xla():
            waiting = pool.submit(in_a_block)
            assert in_a_block() == {1}
        assert waiting.result() == {1}
    assert threads_of_blas() == before


# Which calls NumPy runs.


@meshes.program(by_numpy="exactly")
def _tripled(_: None, x: jax.Array, *, times: int) -> list[jax.Array]:
    return [x * 3 + times, x]


@pytest.fixture
def compilations() -> Any:
    names: list[str] = []
    compile_ = meshes._Compiled.__call__

    def run_by(program: Any, *args: Any) -> Any:
        before = program._by_numpy.run
        found = []
        program._by_numpy.run = lambda *own: found.append(before(*own)) or found[-1]
        try:
            result = compile_(program, *args)
        finally:
            program._by_numpy.run = before
        names.append("XLA" if not found or found[-1] is None else "NumPy")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes._Compiled, "__call__", run_by)
        yield names


def test_first_calls_are_numpys_and_later_ones_xlas(compilations: list[str]) -> None:
    x = jnp.arange(3.0)
    while "XLA" not in compilations:
        np.testing.assert_array_equal(_tripled(None, x, times=1)[0], [1, 4, 7])
    # 8192 to compile a program and 192 for each of its two equations. In each NumPy starts in one
    # and writes 32768 bytes in another. Of two results 16384 bytes become JAX's in one.
    cost = 2 * (1 + 12 / 32768 + 12 / 16384)
    assert compilations.count("NumPy") == int((8192 + 2 * 192) / cost)
    np.testing.assert_array_equal(_tripled(None, x, times=1)[0], [1, 4, 7])
    assert compilations[-2:] == ["XLA", "XLA"]


def test_what_is_used_often_is_compiled_meanwhile(compilations: list[str]) -> None:
    x = jnp.arange(6.0)
    program, _ = _tripled._prepared(None, (x,), {"times": 8})

    def called(calls: int) -> None:
        _tripled.ahead(None, x, calls=calls, times=8)
        for _ in range(calls):
            _tripled(None, x, times=8)

    called(1000)
    called(100)
    assert not program._ahead
    called(1)
    (compiling,) = program._ahead.values()
    compiling.result()
    called(1)
    assert compilations[:1100] == ["NumPy"] * 1100
    assert compilations[-1] == "XLA"


def test_where_many_calls_are_expected_none_is_numpys(compilations: list[str]) -> None:
    x = jnp.arange(4.0)
    _tripled.ahead(None, x, calls=10, times=2)
    _tripled(None, x, times=2)
    _tripled.ahead(None, x, calls=10**6, times=3)
    _tripled(None, x, times=3)
    assert compilations == ["NumPy", "XLA"]


def test_nothing_is_numpys_where_all_is_to_be_compiled(compilations: list[str]) -> None:
    with host.compiled_only():
        _tripled(None, jnp.arange(5.0), times=4)
    with jax.debug_nans(True):
        _tripled(None, jnp.arange(5.0), times=4)
    assert compilations == ["XLA", "XLA"]


def test_results_share_no_memory_with_what_is_given() -> None:
    given_array = np.arange(64, dtype=np.float32)
    _, same = _tripled(None, given_array, times=5)
    given_array[:] = -1
    np.testing.assert_array_equal(same, np.arange(64))


def test_results_are_where_the_arguments_are() -> None:
    committed = jax.device_put(jnp.arange(3.0), jax.devices()[0])
    assert _tripled(None, committed, times=6)[0].committed
    assert not _tripled(None, jnp.arange(3.0), times=6)[0].committed
    if len(jax.devices()) > 1:
        elsewhere = jax.device_put(jnp.arange(3.0), jax.devices()[1])
        assert _tripled(None, elsewhere, times=6)[0].devices() == {jax.devices()[1]}


def test_derivatives_and_batches_are_xlas() -> None:
    x = jnp.arange(3.0)
    assert jax.grad(lambda x: jnp.sum(_tripled(None, x, times=7)[0]))(x).tolist() == [3, 3, 3]
    batch = jax.vmap(lambda x: _tripled(None, x, times=7)[0])(x[:, None])
    assert batch.tolist() == [[7], [10], [13]]


# The same masks, scores and history.

NETWORKS = {
    "lenet": ("lenet", None, (28, 28, 1)),
    "resnet20": ("resnet20", 4, (16, 16, 3)),
    "se_resnet20": ("se_resnet20", 8, (16, 16, 3)),
    "vgg11": ("vgg11", 8, (32, 32, 3)),
    "efficientnet_b0": ("efficientnet_b0", None, (32, 32, 3)),
    "vit_ti8": ("vit_ti8", 24, (32, 32, 3)),
    "gpt2": ("gpt2", 24, (16,)),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def network(request: Any) -> tuple[Any, Any, Any]:
    name, width, shape = request.param
    model = models.create(name, 10, width)
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32 if len(shape) == 3 else jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return model.apply, jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes), x


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "indicator": {"balance": "indicator", "strength": "square", "alpha": 0.7},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_networks_are_pruned_as_xla_prunes_them(network: Any, settings: Any) -> None:
    how = {"sparsity": 0.9, "method": dpai.DPaI(steps=4, **settings), "key": jax.random.key(1)}
    first = dpai.prune(*network, **how, progress=False)
    with host.compiled_only():
        second = dpai.prune(*network, **how, progress=False)
    for name in ("masks", "scores"):
        pairs = zip(*(jax.tree.leaves(getattr(r, name)) for r in (first, second)), strict=True)
        assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    for name in ("nodes", "kernels"):
        np.testing.assert_array_equal(first.history[name], second.history[name])
    np.testing.assert_array_equal(first.history["log_paths"], second.history["log_paths"])
    # The sums of an exact count may differ in the last bits.
    assert first.topology.log_paths == pytest.approx(second.topology.log_paths, rel=1e-6)


@pytest.mark.parametrize(
    "method", [dpai.Magnitude(), dpai.SynFlow(steps=3)], ids=["magnitude", "synflow"]
)
def test_saliencies_are_selected_as_xla_selects_them(method: dpai.Method) -> None:
    fn, shape = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], (300, 240)
    rng = np.random.default_rng(0)
    params = {
        "a": rng.standard_normal(shape, np.float32),
        "b": np.round(3 * rng.random((240, 9)), 1),
    }
    args = fn, jax.tree.map(jnp.float32, params), jnp.ones((1, 300))
    for allocation in (dpai.global_threshold, dpai.erk):
        how = {"method": dataclasses.replace(method, allocation=allocation), "progress": False}
        first = dpai.prune(*args, 0.9, **how)
        with host.compiled_only():
            second = dpai.prune(*args, 0.9, **how)
        jax.tree.map(np.testing.assert_array_equal, first.masks, second.masks)
        jax.tree.map(np.testing.assert_array_equal, first.scores, second.scores)


def test_first_selections_of_saliencies_compile_nothing(compilations: list[str]) -> None:
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.arange(131.0 * 509).reshape(131, 509)}
    dpai.prune(fn, params, jnp.ones((1, 131)), 0.5, method=dpai.Magnitude(), progress=False)
    assert set(compilations) == {"NumPy"}


def test_numpy_counts_saliencies_as_xla_does() -> None:
    values = np.array([np.nan, 0.0, -0.0, np.inf, -1.0, 2.0**-140], np.float32)
    arrays = [jnp.asarray(values), jnp.asarray(np.tile(values, (300, 100)))]
    first = saliency._counts(None, arrays)
    with host.compiled_only():
        second = saliency._counts(None, arrays)
    np.testing.assert_array_equal(first, second)
    # A number below the smallest normal one is zero to XLA on a CPU.
    np.testing.assert_array_equal(first[0], [1, 3])


@given(st.data(), st.booleans(), st.booleans())
def test_selection_by_numpy_is_that_of_the_search(data: Any, magnitude: bool, shared: bool) -> None:
    shapes = [(4, 5), (2, 3, 3), (7,)]
    values = st.sampled_from([-np.inf, -1.0, -0.0, 0.0, 0.25, 0.5, 3.0, np.inf])
    scores = [data.draw(stnp.arrays(np.float32, shape, elements=values)) for shape in shapes]
    if shared:
        keep: Any = data.draw(st.integers(0, 45))
        as_given: Any = jnp.uint32(keep)
    else:
        copies = data.draw(stnp.arrays(np.uint32, (2, 1, 1), elements=st.integers(0, 9)))
        keep = [
            np.uint32(data.draw(st.integers(0, 20))),
            copies,
            np.uint32(data.draw(st.integers(0, 7))),
        ]
        as_given = list(map(jnp.asarray, keep))
    expected, thresholds = _compiled_select(scores, as_given, magnitude=magnitude)
    found, own = select_by_numpy(scores, keep, magnitude=magnitude)
    assert own.shape == thresholds.shape
    assert own.dtype == np.uint32
    for mask, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mask, reference)


_compiled_select = jax.jit(select, static_argnames="magnitude")


def test_numpy_counts_a_topology_and_nan_as_xla_does() -> None:
    net = dpai.trace(
        lambda p, x: lax.conv(x, p["a"], (1, 1), "SAME").mean((2, 3)) @ p["b"],
        {"a": jnp.ones((5, 4, 3, 3)), "b": jnp.ones((5, 2))},
        jnp.ones((1, 4, 8, 8)),
    )
    rng, axes = np.random.default_rng(0), tuple(measuring._axes(net))
    kept, reached = (
        [jnp.asarray(rng.random(layer.shape) < 0.3) for layer in net.layers] for _ in range(2)
    )
    weights = [jnp.where(k, jnp.nan, jnp.inf) for k in kept]
    found = []
    for context in (contextlib.nullcontext, host.compiled_only):
        with context():
            found.append(measuring._count_layers(None, kept, reached, axes=axes))
            found.append(checks._are_nan(None, weights))
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])
    np.testing.assert_array_equal(found[1], [int(k.sum()) for k in kept])
    effective = np.asarray(kept[0] & reached[0])
    kernels = effective.any((2, 3))
    expected = kept[0].sum(), effective.sum(), kernels.any(1).sum(), kernels.sum()
    np.testing.assert_array_equal(found[0][0], np.asarray(expected))

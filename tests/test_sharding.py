"""Pruning on several devices: the same masks as on one, laid out like the parameters."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dpai_jax as dpai
from dpai_jax import counts, measuring
from dpai_jax.methods import ascending, noise, selector
from dpai_jax.methods import dpai as method
from dpai_jax.methods.noise import normal_scores
from tests.support import sharded

DPAI = dpai.DPaI(steps=12)
KINDS = {"explicit": AxisType.Explicit, "automatic": AxisType.Auto}


def assert_same(tree, reference):
    jax.tree.map(np.testing.assert_array_equal, tree, reference)


def assert_laid_out_like(tree, params):
    for leaf, param in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
        assert leaf.ndim == 0 or leaf.sharding == param.sharding


def pruned(name, params, how=DPAI):
    fn, _, x = sharded.network(name)
    return dpai.prune(fn, params, x, 0.8, method=how, key=jax.random.key(1), progress=False)


@functools.cache
def on_one_device(name):
    return pruned(name, sharded.network(name)[1])


# Programs of different shardings are fused differently, which must not change a mask.
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "mesh", "kind"),
    [
        ("mlp", "data", "explicit"),
        ("mlp", "mixed", "explicit"),
        ("mlp", "tensor", "automatic"),
        ("residual", "mixed", "explicit"),
        ("residual", "fsdp", "automatic"),
        ("transformer", "mixed", "explicit"),
    ],
)
def test_masks_are_those_of_one_device_bit_by_bit_and_scores_but_for_rounding(name, mesh, kind):
    _, params, _ = sharded.network(name)
    spread = sharded.spread(params, sharded.mesh(mesh, KINDS[kind]))
    result, reference = pruned(name, spread), on_one_device(name)
    assert_same(result.masks, reference.masks)
    # A compiler may fuse a product and a sum in one program, with one rounding less, and not in
    # the other: in each of 12 steps half a unit in the last place of scores below 4.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6),
        result.scores,
        reference.scores,
    )
    assert_laid_out_like(result.masks, spread)
    assert_laid_out_like(result.scores, spread)
    assert result.topology == reference.topology
    for measured, values in reference.history.items():
        np.testing.assert_allclose(result.history[measured], values, rtol=1e-6)


def test_kernels_may_be_seen_through_reshapes():
    def fn(params, x):
        heads = jnp.einsum("bi,ihd->bhd", x, params["1"].reshape(16, 4, 8))
        return jax.nn.relu(heads.reshape(1, 32)) @ params["2"].reshape(4, 8, 8).reshape(32, 8)

    rng = np.random.default_rng(0)
    shapes = {"1": (16, 32), "2": (32, 8)}
    params = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    spread = sharded.spread(params, sharded.mesh("mixed", AxisType.Auto))
    x = jax.ShapeDtypeStruct((1, 16), jnp.float32)
    how = dpai.DPaI(steps=3)
    result, reference = (
        dpai.prune(fn, p, x, 0.8, method=how, progress=False) for p in (spread, params)
    )
    assert_same(result.masks, reference.masks)
    assert result.topology == reference.topology


@pytest.mark.parametrize("how", [dpai.Random(), dpai.Magnitude(), dpai.Magnitude(dpai.erk)])
def test_other_methods_prune_on_a_mesh_too(how):
    _, params, _ = sharded.network("mlp")
    spread = sharded.spread(params, sharded.mesh("mixed", AxisType.Explicit))
    result, reference = pruned("mlp", spread, how), pruned("mlp", params, how)
    assert_same(result.masks, reference.masks)
    assert_laid_out_like(result.masks, spread)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_mesh_may_be_the_context_s(kind):
    _, params, _ = sharded.network("mlp")
    on = sharded.mesh("mixed", kind)
    with jax.set_mesh(on):
        result = pruned("mlp", sharded.spread(params, on))
    assert_same(result.masks, on_one_device("mlp").masks)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_function_takes_sharded_arrays(kind):
    fn, params, x = sharded.network("mlp")
    spread = sharded.spread(params, sharded.mesh("mixed", kind))
    net = dpai.trace(fn, spread, x)
    keep = dpai.erk(net, 0.8)

    def all_of(params):
        masks = dpai.binarize(params, keep)
        return {
            "masks": masks,
            "repaired": dpai.repair(net, masks, params, jax.random.key(0)),
            "masked": dpai.apply_masks(params, masks),
            "topology": dpai.topology(net, masks),
            "log_paths": float(dpai.log_paths(net, masks)),
        }

    result, reference = all_of(spread), all_of(params)
    assert result.pop("topology") == reference.pop("topology")
    assert result.pop("log_paths") == pytest.approx(reference.pop("log_paths"), abs=1e-5)
    for name, tree in result.items():
        assert_same(tree, reference[name])
        assert_laid_out_like(tree, spread)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_direction_is_that_of_one_device_within_jit_too(kind):
    fn, params, x = sharded.network("mlp")
    spread = sharded.spread(params, sharded.mesh("mixed", kind))
    net = dpai.trace(fn, params, x)
    keep = dpai.erk(net, 0.8)
    ascend = jax.jit(lambda scores: dpai.ascent(net, scores, keep, counting="mean_field"))
    direction = ascend(spread)
    assert_same(direction, ascend(params))
    if kind == AxisType.Explicit:
        assert_laid_out_like(direction, spread)


def programs(params, fn, x, optimizer):
    """The compiled programs of a step, which select weights and move the scores, and topology."""
    net = dpai.trace(fn, params, x)
    how = dpai.DPaI(optimizer=optimizer)
    scores = normal_scores(net, jax.random.key(0), params)
    strengths = method._strengths_of(net, scores, strength=jnp.abs)
    state = ascending.State(scores, how._init(scores))
    keep = [jnp.uint32(k) for k in net.leaves(dpai.erk(net, 0.8))]
    find = (net, scores, keep, jnp.zeros((2, sum(k.size for k in keep)), jnp.uint32))
    masks, _ = selector._select(*find)
    strengths, exponents = zip(*strengths, strict=True)
    step = (net, state, masks, list(strengths), list(exponents), how._weights())
    axes = tuple(measuring._axes(net))
    return [
        selector._select.lower(*find).compile(),
        method.take_step.lower(*step, **how._settings()).compile(),
        counts._reached.lower(net, masks).compile(),
        counts._log_count.lower(net, masks, counting="exact", below=1.0).compile(),
        measuring._count_layers.lower(net, masks, masks, axes=axes).compile(),
    ]


PUT_TOGETHER = "all-gather|all-reduce|collective-permute|collective-broadcast"
ALL = f"{PUT_TOGETHER}|all-to-all"


def exchanged(program, kinds=ALL):
    """The sizes of all arrays that devices hand each other, in numbers of entries."""
    text = program.as_text()
    lines = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", text)
    shapes = re.findall(r"[a-z]\w*\[([\d,]*)\]", " ".join(lines))
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def wide(params, x):
    x = jax.nn.relu(x @ params["1"])
    return jax.nn.relu(x @ params["2"]) @ params["3"]


WIDE = {"1": (64, 256), "2": (256, 512), "3": (512, 64)}


def on_devices(n, kind=AxisType.Explicit):
    mesh = jax.make_mesh((n,), ("fsdp",), axis_types=(kind,), devices=jax.devices()[:n])
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    return {
        name: jax.device_put(rng.standard_normal(shape).astype(np.float32), sharding)
        for name, shape in WIDE.items()
    }


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_sharded_leaf_is_gathered(kind):
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
    rng = np.random.default_rng(0)
    params = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in WIDE.items()}
    spread = sharded.spread(params, sharded.mesh("mixed", kind))
    smallest = min(np.prod(shape) for shape in WIDE.values())
    for program in programs(spread, wide, x, dpai.DPaI.optimizer):
        sizes = exchanged(program)
        assert sizes
        # What goes around is sums and one entry a row, not what the rows hold.
        assert max(sizes) <= smallest / 16


@pytest.mark.parametrize(
    ("name", "kind", "kinds"),
    [("residual", "automatic", ALL), ("transformer", "explicit", PUT_TOGETHER)],
)
def test_no_kernel_of_a_convolution_or_a_scan_is_gathered(name, kind, kinds):
    fn, params, x = sharded.network(name, 8)
    spread = sharded.spread(params, sharded.mesh("mixed", KINDS[kind]))
    kernels = dpai.trace(fn, spread, x).leaves(spread)
    part = min(np.prod(kernel.sharding.shard_shape(kernel.shape)) for kernel in kernels)
    for program in programs(spread, fn, x, dpai.DPaI.optimizer):
        sizes = exchanged(program, kinds)
        assert sizes
        # Two parts of a kernel together are more than all that is put together: sums, and counts
        # at features. Parts of stacked kernels move, each of them from device to device.
        assert max(sizes) < 2 * part


def test_first_scores_are_drawn_on_each_device_by_itself():
    sharding = NamedSharding(sharded.mesh("mixed", AxisType.Auto), PartitionSpec("fsdp", "tensor"))
    digits = np.zeros(2, np.uint32)
    program = noise._drawing((64, 32), sharding).lower(digits, digits).compile()
    assert not exchanged(program)


def test_a_program_that_gathers_a_leaf_is_caught():
    params = on_devices(8, AxisType.Auto)
    whole = NamedSharding(params["2"].sharding.mesh, PartitionSpec())
    gather = jax.jit(lambda x: x + 1, out_shardings=whole)
    assert max(exchanged(gather.lower(params["2"]).compile())) == 256 * 512


def test_memory_of_a_device_falls_with_their_number():
    x = jax.ShapeDtypeStruct((1, 64), jnp.float32)

    def memory(n):
        found = [p.memory_analysis() for p in programs(on_devices(n), wide, x, None)]
        return [
            a.argument_size_in_bytes
            + a.temp_size_in_bytes
            + a.output_size_in_bytes
            - a.alias_size_in_bytes
            for a in found
        ]

    one = memory(1)
    for n in (2, 8):
        for apart, together in zip(memory(n), one, strict=True):
            # What is whole on each device is small: a few numbers for each row of a kernel.
            assert apart < together / n + 0.06 * together


def test_what_the_optimizer_remembers_lies_like_the_scores(monkeypatch):
    states = []
    step = method.take_step

    def keeping(net, state, masks, *args, **settings):
        states.append(jax.tree.map(jnp.copy, (state, masks)))
        return step(net, state, masks, *args, **settings)

    keeping.ahead = step.ahead
    monkeypatch.setattr(method, "take_step", keeping)
    fn, params, x = sharded.network("mlp")
    spread = sharded.spread(params, sharded.mesh("mixed", AxisType.Explicit))
    how = dpai.DPaI(steps=3, optimizer=optax.adam(0.1))
    dpai.prune(fn, spread, x, 0.8, method=how, progress=False)
    assert len(states) == 3
    for state, masks in states:
        adam = state.optimizer[0]
        for part in (state.scores, masks, adam.mu, adam.nu):
            assert_laid_out_like(part, list(spread.values()))

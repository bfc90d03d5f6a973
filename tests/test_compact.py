"""Small networks against masked ones, and channels against a graph search by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpai_jax as dpai
from tests.support.networks.case import normal

PyTree = Any


def drawn(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}


def kept(shape: tuple[int, ...], density: float, seed: int, **dead: list[int]) -> jax.Array:
    """A random mask, in which also the indices named by axis (`a0=[2]`) are dead."""
    mask = np.random.default_rng(seed).random(shape) < density
    for axis, indices in dead.items():
        np.moveaxis(mask, int(axis[1:]), 0)[indices] = False
    return jnp.asarray(mask)


def masks_of(params: PyTree, **masks: jax.Array) -> PyTree:
    return {name: masks.get(name, jnp.ones((), bool)) for name in params}


def with_gradient(fn: Callable[..., Any]) -> Callable[..., Any]:
    def loss(params: PyTree, x: PyTree) -> tuple[jax.Array, PyTree]:
        outputs = fn(params, x)
        sums = [jnp.sum(jnp.sin(y + 0.3)) for y in jax.tree.leaves(outputs)]
        return jnp.sum(jnp.stack(sums)), outputs

    return jax.jit(jax.grad(loss, has_aux=True))


def assert_same(fn: Any, params: PyTree, masks: PyTree, x: PyTree) -> dpai.Compact:
    """Checks outputs and gradients against the masked network's; returns the small network."""
    small = dpai.compact(fn, params, masks, x)
    masked = dpai.apply_masks(params, masks)
    gradient, outputs = with_gradient(fn)(masked, x)
    small_gradient, small_outputs = with_gradient(small.fn)(small.params, x)
    for y, small_y in zip(jax.tree.leaves(outputs), jax.tree.leaves(small_outputs), strict=True):
        np.testing.assert_allclose(small_y, y, 1e-5, 1e-5)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(small_gradient), strict=True)
    for leaf, mask, (g, small_g) in zip(
        small.leaves, jax.tree.leaves(small.masks), pairs, strict=True
    ):
        each = [np.arange(n) if k is None else k for k, n in zip(leaf.kept, g.shape, strict=True)]
        expected = np.asarray(g)[np.ix_(*each)] if g.ndim else g
        np.testing.assert_allclose(
            np.where(mask, small_g, 0), np.where(mask, expected, 0), 1e-4, 1e-5, err_msg=leaf.name
        )
    # Put back, all weights are the masked ones.
    jax.tree.map(np.testing.assert_array_equal, small.expand(small.params), masked)
    return small


def mlp(params: PyTree, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(x @ params["w1"] + params["b1"][None])
    x = jax.nn.relu(x @ params["w2"] + params["b2"][None])
    return x @ params["w3"] + params["b3"][None]


MLP = {"w1": (12, 20), "b1": (20,), "w2": (20, 20), "b2": (20,), "w3": (20, 5), "b3": (5,)}


def searched(masks: PyTree) -> list[np.ndarray]:
    """The input, hidden and output units of `mlp` that are on a path, by a graph search."""
    layers = [np.asarray(masks[name]) for name in ("w1", "w2", "w3")]
    reached = [np.ones(12, bool)]
    for mask in layers:
        reached.append(mask[reached[-1]].any(0))
    leading = [np.ones(5, bool)]
    for mask in reversed(layers):
        leading.append(mask[:, leading[-1]].any(1))
    return [a & b for a, b in zip(reached, reversed(leading), strict=True)]


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3])
def test_exactly_the_units_on_a_path_stay(density: float) -> None:
    params = drawn(0, **MLP)
    masks = masks_of(
        params, **{n: kept(MLP[n], density, seed) for seed, n in enumerate(("w1", "w2", "w3"))}
    )
    small = assert_same(mlp, params, masks, normal(3, 12))
    inputs, first, second, out = (int(units.sum()) for units in searched(masks))
    shapes = {name: leaf.shape for name, leaf in small.params.items()}
    assert shapes["w1"] == (inputs, first)
    assert shapes["b1"] == (first,)
    assert shapes["w2"] == (first, second)
    assert shapes["w3"] == (second, out)
    assert small.after.multiply_adds == 3 * (inputs * first + first * second + second * out)
    assert small.after.weights == sum(leaf.size for leaf in small.params.values())


def test_other_batch_sizes_give_the_masked_outputs() -> None:
    params = drawn(0, **MLP)
    masks = masks_of(params, **{n: kept(MLP[n], 0.1, 3) for n in ("w1", "w2", "w3")})
    small = dpai.compact(mlp, params, masks, jax.ShapeDtypeStruct((1, 12), jnp.float32))
    # That of 5 first comes within a trace.
    for batch, run in ((1, small.fn), (2, small.fn), (5, jax.jit(small.fn))):
        x = normal(batch, 12)
        expected = mlp(dpai.apply_masks(params, masks), x)
        np.testing.assert_allclose(run(small.params, x), expected, 1e-5, 1e-5)


def test_nothing_dead_keeps_all_shapes() -> None:
    params = drawn(0, **MLP)
    small = assert_same(mlp, params, masks_of(params), normal(3, 12))
    assert jax.tree.map(jnp.shape, small.params) == MLP
    assert small.before == small.after
    assert small.remarks == ()


def test_a_step_of_training_is_the_masked_network_s() -> None:
    params = drawn(0, **MLP)
    # All output units are reached, so that no bias of one is frozen.
    masks = masks_of(
        params,
        w1=kept(MLP["w1"], 0.2, 1),
        w2=kept(MLP["w2"], 0.2, 2),
        w3=kept(MLP["w3"], 0.6, 3),
    )
    x = normal(4, 12)
    small = dpai.compact(mlp, params, masks, x)

    def step(fn: Any, params: PyTree, masks: PyTree) -> PyTree:
        tx = dpai.keep_pruned(optax.sgd(0.05, momentum=0.9), masks)
        state = tx.init(params)
        for _ in range(3):
            gradient = jax.grad(lambda p: jnp.mean(fn(p, x) ** 2))(params)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    trained = step(small.fn, small.params, small.masks)
    # Frozen in the large network: what acts through dead units alone.
    masked = dpai.apply_masks(params, masks)
    frozen = {
        leaf.name: np.ix_(
            *(np.arange(n) if k is None else k for k, n in zip(leaf.kept, leaf.before, strict=True))
        )
        for leaf in small.leaves
    }
    stays = {n: jnp.zeros(MLP[n], bool).at[frozen[n]].set(True) for n in MLP}

    def fn(p: PyTree, x: jax.Array) -> jax.Array:
        return mlp({n: jnp.where(stays[n], p[n], masked[n]) for n in p}, x)

    whole = step(fn, masked, masks)
    for name in MLP:
        np.testing.assert_allclose(trained[name], whole[name][frozen[name]], 1e-4, 1e-6)
        np.testing.assert_array_equal(np.where(small.masks[name], 0, trained[name]), 0)


def test_numbers_of_dead_channels_reach_what_follows() -> None:
    """Shapes of feature maps with zero padding: the number differs at the edge."""

    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        for i in (1, 2):
            x = jax.lax.conv_general_dilated(
                x, params[f"w{i}"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(x + params[f"b{i}"][None, None, None])
        return x

    params = drawn(1, w1=(3, 3, 2, 8), b1=(8,), w2=(3, 3, 8, 4), b2=(4,))
    params["b1"] = jnp.abs(params["b1"])
    masks = masks_of(
        params,
        w1=kept((3, 3, 2, 8), 0.6, 0, a3=[0, 3, 4]),
        w2=kept((3, 3, 8, 4), 0.6, 0, a2=[1], a3=[2]),
    )
    small = assert_same(fn, params, masks, normal(2, 5, 5, 2))
    assert small.params["w1"].shape == (3, 3, 2, 4)
    assert small.params["w2"].shape == (3, 3, 4, 3)  # output 2 is the number of its bias
    other = normal(3, 4, 7, 2)
    np.testing.assert_allclose(
        small.fn(small.params, other), fn(dpai.apply_masks(params, masks), other), 1e-5, 1e-5
    )


def test_zeros_of_dead_channels_count_as_pruned() -> None:
    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        gate = jax.nn.sigmoid(x @ params["gate"])
        return (gate * (x @ params["up"] + params["bias"][None])) @ params["down"]

    params = drawn(0, gate=(4, 6), up=(4, 6), down=(6, 3), bias=(6,))
    masks = masks_of(params, up=kept((4, 6), 1.0, 0, a1=[1, 2]))
    # With a bias the gate acts on a number, so it stays.
    assert assert_same(fn, params, masks, normal(2, 4)).params["gate"].shape == (4, 6)
    params["bias"] = jnp.zeros(6)
    small = assert_same(fn, params, masks, normal(2, 4))
    assert jax.tree.map(jnp.shape, small.params) == {
        "gate": (4, 4), "up": (4, 4), "down": (4, 3), "bias": (4,)
    }  # fmt: skip
    # Zeros that act on what lives, such as a norm's last scale before training, do not.
    params["up"] = jnp.zeros((4, 6))
    assert assert_same(fn, params, masks_of(params), normal(2, 4)).params["up"].shape == (4, 6)


def layer_norm(x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + 1e-5)


def rms_norm(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def group_norm(x: jax.Array) -> jax.Array:
    return layer_norm(x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)).reshape(x.shape)


def batch_norm(x: jax.Array) -> jax.Array:
    mean = jnp.mean(x, 0, keepdims=True)
    variance = jnp.mean(x**2, 0, keepdims=True) - mean**2
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm, group_norm, batch_norm])
def test_dead_channels_belong_to_a_norm_s_statistics(norm: Any) -> None:
    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        h = norm(x @ params["w1"] + params["b1"][None]) * params["scale"][None]
        return jax.nn.gelu(h + params["shift"][None]) @ params["w2"]

    params = drawn(2, w1=(5, 8), b1=(8,), scale=(8,), shift=(8,), w2=(8, 3))
    masks = masks_of(
        params, w1=kept((5, 8), 0.7, 1, a1=[0, 5]), w2=kept((8, 3), 0.7, 2, a0=[0, 2, 5])
    )
    small = assert_same(fn, params, masks, normal(6, 5))
    # Dead on both sides: 0 and 5. Unit 2 leads nowhere, but is part of the statistics of others.
    own = norm is batch_norm
    assert small.params["w1"].shape == (5, 5 if own else 6)
    assert small.params["w2"].shape == (5, 3)
    assert small.params["scale"].shape == (5,)


def test_residual_sums_and_concatenations() -> None:
    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        stream = x @ params["embed"]
        inner = jnp.tanh(stream @ params["up"] + params["bias"][None])
        stream = stream + inner @ params["down"]
        both = jnp.concatenate([stream, inner], 1)
        return both[:, ::2] @ params["head"]

    params = drawn(3, embed=(4, 8), up=(8, 10), bias=(10,), down=(10, 8), head=(9, 3))
    masks = masks_of(
        params,
        embed=kept((4, 8), 1.0, 0, a1=[1, 4, 6]),
        up=kept((8, 10), 1.0, 0, a1=[0, 3]),
        down=kept((10, 8), 1.0, 0, a1=[1, 6]),
        head=kept((9, 3), 1.0, 0, a0=[0, 5]),
    )
    small = assert_same(fn, params, masks, normal(2, 4))
    # `up` reads the five channels that `embed` writes; its units 0 and 3 are numbers. The head
    # reads channels 2 and 4 of the stream (0 is masked, 6 never written), and units 4, 6 and 8.
    assert small.params["embed"].shape == (4, 5)
    assert small.params["up"].shape == (5, 8)
    assert small.params["down"].shape == (8, 2)
    assert small.params["head"].shape == (5, 3)


@pytest.mark.parametrize(("groups", "outputs"), [(8, 8), (8, 16), (2, 8), (4, 8)])
def test_depthwise_and_grouped_convolutions(groups: int, outputs: int) -> None:
    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        x = jax.nn.silu(x @ params["expand"])
        x = jax.lax.conv_general_dilated(
            x,
            params["middle"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )
        x = jax.nn.relu(x + params["bias"][None, None, None])
        return jnp.mean(x, (1, 2)) @ params["project"]

    shape = (3, 3, 8 // groups, outputs)
    params = drawn(4, expand=(2, 8), middle=shape, bias=(outputs,), project=(outputs, 3))
    masks = masks_of(
        params,
        expand=kept((2, 8), 1.0, 0, a1=[1, 3]),
        middle=kept(shape, 0.7, 1, a3=[2, 3]),
        project=kept((outputs, 3), 1.0, 1, a0=[outputs - 1]),
    )
    small = assert_same(fn, params, masks, normal(2, 4, 4, 2))
    assert small.after.weights < small.before.weights
    assert small.params["expand"].shape[1] < 8


def test_attention_heads_and_their_features() -> None:
    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        q, k, v = (
            jnp.einsum("btd,dhe->bthe", x, params[n]) + params["bias"][i][None, None]
            for i, n in enumerate("qkv")
        )
        logits = jnp.einsum("bqhe,bkhe->bhqk", q, k)
        values = jnp.einsum("bhqk,bkhe->bqhe", jax.nn.softmax(logits), v)
        return jnp.einsum("bthe,hed->btd", values, params["out"])

    params = drawn(5, q=(6, 4, 5), k=(6, 4, 5), v=(6, 4, 5), out=(4, 5, 6), bias=(3, 4, 5))
    params["bias"] = jnp.zeros((3, 4, 5)).at[2].set(1.0)
    masks = masks_of(
        params,
        q=kept((6, 4, 5), 0.7, 0, a2=[1]),
        k=kept((6, 4, 5), 0.7, 1, a2=[4]),
        v=kept((6, 4, 5), 0.7, 2, a2=[0]),
        out=kept((4, 5, 6), 0.7, 3, a0=[2]),
    )
    small = assert_same(fn, params, masks, normal(2, 3, 6))
    assert small.params["q"].shape == small.params["k"].shape == (6, 3, 3)
    # Feature 0 of the values is a number. Attention to it is not: its weights could change.
    assert small.params["v"].shape == (6, 3, 4)
    assert small.params["out"].shape == (3, 5, 6)


def test_what_has_no_rule_is_computed_whole_and_named() -> None:
    def fn(params: PyTree, x: jax.Array) -> jax.Array:
        h = x @ params["w1"]
        h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h), None), h, length=2)
        return h @ params["w2"]

    params = drawn(6, w1=(4, 8), w2=(8, 3))
    masks = masks_of(params, w1=kept((4, 8), 1.0, 0, a1=[2]), w2=kept((8, 3), 1.0, 0, a0=[5]))
    small = assert_same(fn, params, masks, normal(2, 4))
    assert any("scan" in remark and "test_compact" in remark for remark in small.remarks)


def test_bad_inputs_raise_one_clear_sentence() -> None:
    params = drawn(0, **MLP)
    masks = masks_of(params, w1=kept(MLP["w1"], 0.5, 0))
    x = normal(2, 12)
    with pytest.raises(TypeError, match="fn must be a function"):
        dpai.compact(3, params, masks, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        dpai.compact(mlp, params, {"w1": masks["w1"]}, x)
    with pytest.raises(ValueError, match="masks must have shape"):
        dpai.compact(mlp, params, masks | {"w2": masks["w1"]}, x)
    with pytest.raises(TypeError, match="masks must be boolean"):
        dpai.compact(mlp, params, masks | {"w2": jnp.ones(())}, x)
    with pytest.raises(TypeError, match=r"outside of jax\.jit"):
        jax.jit(lambda p: dpai.compact(mlp, p, masks, x).params)(params)
    small = dpai.compact(mlp, params, masks | {"w2": kept(MLP["w2"], 0.01, 0)}, x)
    with pytest.raises(ValueError, match="shapes of the smaller network"):
        small.fn(params, x)
    with pytest.raises(ValueError, match="params must have shape"):
        small.expand(params)

"""Pruned networks as files: what numpy and json alone read in them, and what loading refuses."""

import dataclasses
import json
import os
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import dpai_jax as dpai
from experiments.devices import DATA
from tests.support.meshes import mesh_of

X = jnp.ones((1, 6, 6, 2))


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(5, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def params():
    return Small().init(jax.random.key(0), X)


@pytest.fixture(scope="module")
def result(params):
    return dpai.prune(Small().apply, params, X, 0.7, key=jax.random.key(3), repair=True)


@pytest.fixture
def file(tmp_path, result):
    dpai.save(tmp_path / "masks.safetensors", result)
    return tmp_path / "masks.safetensors"


def _read_by_hand(path):
    """The arrays and the JSON text of a file, by the published description of its format."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header.pop("__metadata__")["dpai_jax"])
    types = {"U8": np.uint8, "F32": np.float32, "F64": np.float64, "U32": np.uint32}
    arrays = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], types[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return arrays, about


def test_numpy_and_json_read_the_masks_scores_and_settings(file, result):
    arrays, about = _read_by_hand(file)
    kernel = result.masks["params"]["Conv_0"]["kernel"]
    bits = arrays["masks/params/Conv_0/kernel"]
    assert bits.nbytes == -(-kernel.size // 8)
    in_order = [(int(bits[i // 8]) >> (7 - i % 8)) & 1 for i in range(kernel.size)]
    np.testing.assert_array_equal(np.reshape(in_order, kernel.shape), kernel)
    scores = arrays["scores/params/Conv_0/kernel"]
    np.testing.assert_array_equal(scores, result.scores["params"]["Conv_0"]["kernel"])
    np.testing.assert_array_equal(arrays["history/log_paths"], result.history["log_paths"])
    assert about["shapes"]["params/Conv_0/bias"] == []
    assert about["settings"]["sparsity"] == 0.7
    assert about["settings"]["key"] == [0, 3]
    assert about["settings"]["repair"] is True
    assert about["settings"]["method"]["type"] == "DPaI"
    assert float(about["settings"]["method"]["alpha"]) == dpai.DPaI().alpha
    kept = sum(int(np.unpackbits(a).sum()) for name, a in arrays.items() if name[:6] == "masks/")
    assert kept == sum(layer["weights"] for layer in about["topology"]["layers"]) == 32  # of 105


def test_what_a_method_closes_over_is_named_and_not_read(tmp_path, params):
    kept = []

    def init(key):
        kept.append(key)  # a tracer, which nobody may read later
        return params

    result = dpai.prune(Small().apply, params, X, 0.5, method=dpai.NTKSAP(1, init=init))
    dpai.save(tmp_path / "file", result)
    settings = dpai.load(tmp_path / "file", params).settings["method"]["init"]
    assert settings["function"].endswith("init")
    kernel = settings["params"]["params"]["Conv_0"]["kernel"]
    assert kernel == {"array": "float32[3, 3, 2, 5]"}


def test_what_was_saved_is_loaded(file, params, result):
    loaded = dpai.load(file, params)
    for tree in ("masks", "scores"):
        jax.tree.map(np.testing.assert_array_equal, getattr(loaded, tree), getattr(result, tree))
    assert loaded.masks["params"]["Dense_0"]["kernel"].dtype == bool
    assert loaded.topology == result.topology
    assert loaded.settings == result.settings
    assert loaded.seconds == result.seconds
    assert set(loaded.history) == set(result.history)
    assert repr(loaded) == repr(result)
    dpai.keep_pruned(optax.sgd(0.1), loaded.masks).init(dpai.apply_masks(params, loaded.masks))


def test_shapes_are_enough_to_load(file, params, result):
    shapes = jax.eval_shape(lambda: params)
    loaded = dpai.load(file, shapes)
    jax.tree.map(np.testing.assert_array_equal, loaded.masks, result.masks)


def test_masks_are_loaded_where_the_parameters_are(file, params):
    sharding = NamedSharding(mesh_of(5), PartitionSpec(DATA))
    params = jax.tree.map(lambda p: p, params)
    kernel = params["params"]["Dense_0"]["kernel"]
    params["params"]["Dense_0"]["kernel"] = jax.device_put(kernel, sharding)
    loaded = dpai.load(file, params)
    assert loaded.masks["params"]["Dense_0"]["kernel"].sharding == sharding


def test_a_network_without_any_path_is_saved_too(tmp_path, params, result):
    masks = jax.tree.map(lambda m: jnp.zeros_like(m) if m.ndim else m, result.masks)
    topology = dpai.topology(result.net, masks)
    dead = dataclasses.replace(result, masks=masks, topology=topology)
    dpai.save(tmp_path / "dead", dead)
    assert dpai.load(tmp_path / "dead", params).topology == topology
    assert topology.log_paths == -np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["Dense_0"].pop("bias"), "they have no leaf 'params/Dense_0/bias'"),
        (lambda p: p.update(more=jnp.ones(2)), "it has no leaf 'params/more'"),
        (
            lambda p: p["Dense_0"].update(kernel=jnp.ones((5, 4))),
            r"params/Dense_0/kernel is \[5, 4\] where the file has \[5, 3\]",
        ),
    ],
)
def test_other_parameters_are_refused(file, params, change, message):
    other = jax.tree.map(lambda p: p, params)
    change(other["params"])
    with pytest.raises(ValueError, match=f"^params must be those of {file}, but {message}$"):
        dpai.load(file, other)


def test_damaged_files_are_refused(file, params, tmp_path):
    data = file.read_bytes()
    other = tmp_path / "other"
    plain = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    for bad in (
        data[:-1],
        data[:20],
        b"",
        b"hello",
        len(plain).to_bytes(8, "little") + plain + b"x",
    ):
        other.write_bytes(bad)
        with pytest.raises(ValueError, match=re.escape(f"that save wrote, but {other} is not")):
            dpai.load(other, params)
    newer = data.replace(b'{\\"format\\": 1,', b'{\\"format\\": 2,')
    assert newer != data
    other.write_bytes(newer)
    with pytest.raises(ValueError, match="must be a file of format 1"):
        dpai.load(other, params)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        dpai.load(tmp_path / "nowhere", params)
    with pytest.raises(TypeError, match="result must be what prune returned, got 3"):
        dpai.save(other, 3)


@pytest.mark.parametrize("part", ["masks", "scores"])
def test_files_whose_arrays_are_not_those_of_their_shapes_are_refused(file, params, part):
    arrays, about = _read_by_hand(file)
    name = f"{part}/params/Dense_0/kernel"
    others = {key: array for key, array in arrays.items() if key != name}
    for changed in (others, others | {name: arrays[name][:-1]}):
        safetensors.numpy.save_file(changed, file, {"dpai_jax": json.dumps(about)})
        with pytest.raises(ValueError, match=f"file that save wrote, but in {file} {name} has"):
            dpai.load(file, params)


@pytest.mark.standard_promotion
def test_a_masked_training_state_is_restored_on_another_mesh(tmp_path):
    """Parameters, what the optimizer remembers, and masks, by orbax; then training goes on."""

    def fn(params, x):
        return nn.relu(x @ params["hidden"]) @ params["out"]

    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((32, 16), (32, 8)))
    params = {
        "hidden": jnp.asarray(rng.standard_normal((16, 24)), jnp.float32),
        "out": jnp.asarray(rng.standard_normal((24, 8)), jnp.float32),
    }

    def placed(tree, shape, *spec):
        axes = (AxisType.Auto,) * len(shape)
        mesh = jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=axes)

        def sharding(leaf):
            return NamedSharding(mesh, PartitionSpec(*spec) if np.ndim(leaf) else PartitionSpec())

        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(leaf)), tree
        )

    def step(state):
        tx = dpai.keep_pruned(optax.adamw(0.1, weight_decay=0.1), state["masks"])
        loss = lambda params: jnp.mean(jnp.square(fn(params, x) - y))  # noqa: E731
        updates, memory = tx.update(
            jax.grad(loss)(state["params"]), state["memory"], state["params"]
        )
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "memory": memory, "masks": state["masks"]}

    masks = dpai.prune(fn, params, x, 0.8, method=dpai.Magnitude(), progress=False).masks
    tx = dpai.keep_pruned(optax.adamw(0.1, weight_decay=0.1), masks)
    params = dpai.apply_masks(params, masks)
    state = {"params": params, "memory": tx.init(params), "masks": masks}
    rows = placed(state, {"fsdp": 8}, "fsdp")
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, rows))
    for _ in range(2):
        state = jax.jit(step)(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    both = placed(state, {"data": 2, "tensor": 4}, "data", "tensor")
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", both)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert all(
        leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(both), strict=True)
    )
    state, restored = jax.jit(step)(state), jax.jit(step)(restored)
    for name, mask in masks.items():
        moments = restored["memory"][0]
        for tree in (restored["params"], moments.mu, moments.nu):
            assert not np.any(np.asarray(tree[name])[~mask])
        assert np.all(np.asarray(restored["params"][name])[mask])
        np.testing.assert_allclose(
            restored["params"][name], state["params"][name], rtol=1e-4, atol=1e-5
        )


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, result, monkeypatch):
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dpai.save(file, result)
    assert file.read_bytes() == before
    assert list(pathlib.Path(file.parent).iterdir()) == [file]

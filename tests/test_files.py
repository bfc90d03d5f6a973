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
import pytest
from jax.sharding import NamedSharding, PartitionSpec

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


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, result, monkeypatch):
    before = file.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dpai.save(file, result)
    assert file.read_bytes() == before
    assert list(pathlib.Path(file.parent).iterdir()) == [file]

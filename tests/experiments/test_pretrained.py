import dataclasses

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

from experiments import jobs, pretrained, provenance, train
from experiments.config import Config, ConfigError

# Optax's schedules promote their integer step count.
pytestmark = pytest.mark.standard_promotion

TINY = Config(model="tiny", width=2, method="magnitude", sparsity=0.5, epochs=1)


@pytest.fixture(scope="module")
def job():
    return train.resolve(TINY)


@pytest.fixture(scope="module")
def fresh(job):
    return train.initial_variables(job)


@pytest.fixture(scope="module")
def trained(fresh):
    """Other values of the same names, as NumPy's."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), fresh)


def _flat(variables, separator):
    return flax.traverse_util.flatten_dict(variables, sep=separator)


def _write_msgpack(path, variables):
    path.write_bytes(flax.serialization.msgpack_serialize(variables))


def _write_orbax(path, variables):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, variables)


def _write_steps(path, variables):
    with ocp.CheckpointManager(path) as manager:
        for step, tree in ((9, jax.tree.map(np.zeros_like, variables)), (10, variables)):
            manager.save(step, args=ocp.args.StandardSave(tree))


WRITERS = {
    "params_and_statistics.msgpack": _write_msgpack,
    "with_an_optimizer.msgpack": lambda path, variables: _write_msgpack(
        path,
        flax.serialization.to_state_dict(
            variables | {"step": 3, "opt_state": optax.adam(0.1).init(variables["params"])}
        ),
    ),
    "dots.safetensors": lambda path, variables: safetensors.numpy.save_file(
        _flat(variables, "."), path
    ),
    "slashes.safetensors": lambda path, variables: safetensors.numpy.save_file(
        _flat(variables, "/"), path
    ),
    "bare.safetensors": lambda path, variables: safetensors.numpy.save_file(
        _flat(variables["params"], ".")
        | {f"batch_stats.{name}": x for name, x in _flat(variables["batch_stats"], ".").items()},
        path,
    ),
    "orbax": _write_orbax,
    "orbax_of_steps": _write_steps,
}


@pytest.mark.parametrize("name", WRITERS)
def test_weights_and_statistics_are_those_of_the_checkpoint(tmp_path, fresh, trained, name):
    WRITERS[name](tmp_path / name, trained)
    loaded = pretrained.load_variables(tmp_path / name, fresh)
    assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
    jax.tree.map(np.testing.assert_array_equal, loaded, trained)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))


@pytest.mark.parametrize("name", ["file.msgpack", "file.safetensors"])
def test_statistics_that_a_checkpoint_lacks_stay_fresh(tmp_path, fresh, trained, name):
    write = _write_msgpack
    if name.endswith("safetensors"):
        write = lambda path, tree: safetensors.numpy.save_file(_flat(tree, "."), path)  # noqa: E731
    write(tmp_path / name, trained["params"])
    loaded = pretrained.load_variables(tmp_path / name, fresh)
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], trained["params"])
    jax.tree.map(np.testing.assert_array_equal, loaded["batch_stats"], fresh["batch_stats"])


def test_weights_of_bfloat16_become_float32(tmp_path, fresh, trained):
    halves = jax.tree.map(lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16)), trained)
    safetensors.numpy.save_file(_flat(halves, "."), tmp_path / "half.safetensors")
    loaded = pretrained.load_variables(tmp_path / "half.safetensors", fresh)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.float32)}
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float32)), loaded, halves
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"params/Dense_0/kernel": np.zeros((16, 7), np.float32)},
            r"has another shape of params/Dense_0/kernel \(\(16, 7\), not \(16, 10\)\)\.$",
        ),
        ({"params/Dense_0/kernel": None}, r"it lacks params/Dense_0/kernel\.$"),
        ({"params/head/bias": np.zeros(3, np.float32)}, r"it has besides params/head/bias\.$"),
        ({"batch_stats/BatchNorm_0/mean": None}, r"it lacks batch_stats/BatchNorm_0/mean\.$"),
    ],
)
def test_what_differs_from_the_network_is_named(tmp_path, fresh, trained, change, message):
    file = tmp_path / "other.safetensors"
    changed = _flat(trained, "/") | change
    safetensors.numpy.save_file({n: x for n, x in changed.items() if x is not None}, file)
    with pytest.raises(ConfigError, match=message) as caught:
        pretrained.load_variables(file, fresh)
    assert "\n" not in str(caught.value)


def test_many_differences_are_counted(tmp_path, fresh, trained):
    head = {"params": {"Dense_0": trained["params"]["Dense_0"]}}
    _write_msgpack(tmp_path / "head.msgpack", head)
    with pytest.raises(
        ConfigError, match=r"it lacks params/.*, params/.*, params/.* and 3 more\.$"
    ):
        pretrained.load_variables(tmp_path / "head.msgpack", fresh)


@pytest.mark.parametrize("name", ["no.msgpack", "no.safetensors", "text.txt", "folder"])
def test_what_is_no_checkpoint_is_refused(tmp_path, fresh, name):
    (tmp_path / "folder").mkdir()
    for file in ("no.msgpack", "no.safetensors", "text.txt"):
        (tmp_path / file).write_text("nothing\nof the kind")
    with pytest.raises(ConfigError, match=r"init .*(can't be read|must be a \.msgpack)") as caught:
        pretrained.load_variables(tmp_path / name, fresh)
    assert "\n" not in str(caught.value)


def test_a_job_is_refused_before_it_starts_where_its_checkpoint_is_missing(tmp_path):
    config = dataclasses.replace(TINY, init=str(tmp_path / "none.msgpack"))
    with pytest.raises(
        ConfigError, match=r"init must be a file or folder that exists; got '.*none"
    ):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["magnitude", "imp"])
def test_methods_prune_the_weights_that_were_loaded(tmp_path, job, trained, method, monkeypatch):
    file = tmp_path / "start.msgpack"
    _write_msgpack(file, trained)
    config = dataclasses.replace(TINY, init=str(file), method=method)
    job = train.resolve(config)
    # A training that leaves the weights as they are: IMP is then magnitude pruning, too.
    monkeypatch.setattr(train, "train_variables", lambda job, variables, masks: variables)
    result = train.prune(job, train.initial_variables(job), lambda *_: None)
    pairs = zip(
        jax.tree.leaves(trained["params"]), jax.tree.leaves(result.masks["params"]), strict=True
    )
    weights, masks = zip(*[(w.ravel(), np.ravel(m)) for w, m in pairs if w.ndim > 1], strict=True)
    weights, masks = np.abs(np.concatenate(weights)), np.concatenate(masks)
    assert weights[masks].min() > weights[~masks].max()


def test_training_starts_from_the_loaded_weights(tmp_path, fresh, trained):
    def interrupt(stage, *_):
        if stage == "train":
            raise KeyboardInterrupt

    file = tmp_path / "start.msgpack"
    _write_msgpack(file, trained)
    config = dataclasses.replace(TINY, init=str(file), method="dense")
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(config, tmp_path / "run", report=interrupt)
    # A job's own folder is a checkpoint to start from, too.
    start = pretrained.load_variables(tmp_path / "run", fresh)
    jax.tree.map(np.testing.assert_array_equal, start, trained)


def _descriptions(config, file):
    """A job's descriptions as a file of its changes, and changes back."""
    found = []
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        provenance.content.cache_clear()
        found.append(jobs.description(config))
    return found


def test_a_changed_checkpoint_makes_another_job(tmp_path):
    config = dataclasses.replace(TINY, init=str(tmp_path / "start.msgpack"))
    found = _descriptions(config, tmp_path / "start.msgpack")
    assert found[0] == found[2] != found[1]
    assert "init" not in jobs.description(TINY)


def test_changed_data_of_ones_own_make_another_job(tmp_path):
    config = dataclasses.replace(TINY, dataset=f"npz:{tmp_path / 'mine.npz'}")
    with pytest.raises(ConfigError, match=r"^dataset must exist; got 'npz:.*mine\.npz'\.$"):
        jobs.description(config)
    found = _descriptions(config, tmp_path / "mine.npz")
    assert found[0] == found[2] != found[1]
    assert "data" not in jobs.description(TINY)


def test_a_folders_hash_is_that_of_its_files_and_their_names(tmp_path):
    def digest(**files):
        provenance.content.cache_clear()
        for file in tmp_path.iterdir():
            file.unlink()
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        return provenance.content(tmp_path)

    hashes = [digest(a="1", b="2"), digest(a="2", b="1"), digest(a="1", c="2")]
    assert len(set(hashes)) == 3
    assert digest(b="2", a="1") == hashes[0]

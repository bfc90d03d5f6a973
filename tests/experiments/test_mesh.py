"""Training on eight devices that share each batch, held against one device; and in bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import devices, steps, train
from experiments.config import Config, ConfigError
from tests.support.meshes import mesh_of

# The tests' own setting is to train on one device.
mesh_of_all = devices.data_mesh
pytestmark = pytest.mark.standard_promotion

TINY = Config(model="tiny", width=8, method="random", sparsity=0.8, epochs=2, batch_size=64)


def start(config, mesh):
    job = train.resolve(config, mesh)
    variables = steps.initialize(job.model, config.seed, job.data.image_shape)
    masks = train.prune(job, variables, lambda *_: None).masks
    state = steps.start(job.optimizer, *devices.on_each(mesh, (variables, masks["params"])))
    return job, state


def batch(job):
    return next(iter(job.feeds["train"].epoch(0)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What training reports on one device and on eight."""
    return {
        count: train.train_and_evaluate(
            TINY, tmp_path_factory.mktemp(f"on{count}"), mesh=mesh_of(count)
        )
        for count in (1, 8)
    }


def test_eight_devices_train_like_one(runs):
    one, eight = runs[1], runs[8]
    # Sums over a batch are taken in another order; rounding grows from step to step.
    for first, second in zip(one["history"], eight["history"], strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], rel=1e-3)
        images = 360
        for split in ("validation_accuracy", "train_accuracy"):
            assert abs(second[split] - first[split]) <= 4 / images
    assert eight["topology"] == one["topology"]


def test_a_step_on_eight_devices_is_one_over_the_whole_batch():
    """Losses, gradients and the statistics of batch normalisation are those of all images."""
    results = []
    for count in (1, 8):
        job, state = start(TINY, mesh_of(count))
        images, labels = batch(job)
        assert len(images.sharding.device_set) == count
        assert images.addressable_shards[0].data.shape[0] == 64 // count
        results.append(steps.train_step(job.model, job.optimizer, state, images, labels))
    (one, loss), (eight, other_loss) = results
    assert other_loss["train_loss"] == pytest.approx(float(loss["train_loss"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(eight), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(eight):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8


def test_a_run_goes_on_on_another_number_of_devices(tmp_path, monkeypatch, runs):
    class InterruptionError(Exception):
        pass

    def interrupt(stage, done, *_):
        if stage == "train" and done == 1:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        train.train_and_evaluate(
            TINY, tmp_path, mesh=mesh_of(8), report=interrupt, checkpoint_seconds=0.0
        )
    trained = []
    epoch = train.train_epoch

    def counting(*arguments):
        trained.append(arguments[-1])
        return epoch(*arguments)

    monkeypatch.setattr(train, "train_epoch", counting)
    metrics = train.train_and_evaluate(TINY, tmp_path, mesh=mesh_of(2))
    assert trained == [1]
    losses = [h["train_loss"] for h in metrics["history"]]
    assert losses == pytest.approx([h["train_loss"] for h in runs[1]["history"]], rel=1e-3)


@pytest.mark.parametrize("batch_size", [60, 4])
def test_a_batch_that_devices_cannot_share_is_refused(batch_size):
    config = dataclasses.replace(TINY, batch_size=batch_size)
    message = f"batch_size must be a multiple of the 8 devices .*; got {batch_size}"
    with pytest.raises(ConfigError, match=message):
        train.resolve(config, mesh_of(8))


def test_bfloat16_is_what_networks_compute_in_and_float32_what_is_kept():
    config = dataclasses.replace(TINY, dtype="bfloat16", learning_rate=0.2)
    job, state = start(config, mesh_of(8))
    images, labels = batch(job)
    logits = job.model.apply({"params": state.params, "batch_stats": state.batch_stats}, images)
    assert logits.dtype == jnp.bfloat16
    losses = []
    for _ in range(12):
        state, metrics = steps.train_step(job.model, job.optimizer, state, images, labels)
        assert metrics["train_loss"].dtype == jnp.float32
        losses.append(float(metrics["train_loss"]))
    assert losses[-1] < 0.8 * losses[0]
    floating = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {x.dtype for x in floating} == {jnp.dtype("float32")}
    pairs = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.masks), strict=True)
    pruned = [np.asarray(p)[~np.asarray(m)] for p, m in pairs if m.ndim]
    assert sum(p.size for p in pruned) > 0
    assert not any(np.any(p) for p in pruned)


def test_a_dtype_that_nobody_computes_in_is_refused():
    with pytest.raises(ConfigError, match=r"dtype must be one of .*; got 'float16'"):
        dataclasses.replace(TINY, dtype="float16").check()


def test_all_devices_share_batches_by_default(monkeypatch):
    monkeypatch.setattr(devices, "data_mesh", mesh_of_all)
    assert train.resolve(TINY).mesh.shape == {devices.DATA: 8}

import dataclasses
import shutil
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import dpai_jax as dpai
from experiments import datasets, models, steps, train
from experiments.config import Config, ConfigError
from experiments.methods import METHODS
from tests.support.meshes import mesh_of

# Optax's schedules promote their integer step count.
pytestmark = pytest.mark.standard_promotion

TINY = Config(model="tiny", width=8, method="random", sparsity=0.8, epochs=4, batch_size=32)


def _final(workdir):
    """The arrays of the newest checkpoint, read by orbax alone."""
    with ocp.CheckpointManager(workdir) as manager:
        restore = ocp.args.StandardRestore()
        items = ocp.args.Composite(state=restore, masks=restore)
        return manager.restore(manager.latest_step(), args=items)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Metrics, folder and reports of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    reports = []
    metrics = train.train_and_evaluate(
        TINY, workdir, report=lambda *arguments: reports.append(arguments)
    )
    return metrics, workdir, reports


def test_training_lowers_the_loss_and_beats_guessing(whole_run):
    metrics, _, _ = whole_run
    losses = [epoch["train_loss"] for epoch in metrics["history"]]
    assert len(losses) == 4
    assert losses[-1] < 0.7 * losses[0]
    assert metrics["train_loss"] == losses[-1]
    assert metrics["history"][-1]["train_accuracy"] > 0.3


def test_pruned_weights_are_exactly_zero_and_the_others_trained(whole_run):
    final = _final(whole_run[1])
    params = jax.tree.leaves(final.state["params"])
    masks = jax.tree.leaves(final.masks)
    pairs = [(p, m) for p, m in zip(params, masks, strict=True) if m.ndim]
    size = sum(m.size for _, m in pairs)
    assert sum(int(m.sum()) for _, m in pairs) == round(0.2 * size)
    assert all(not np.any(p[~m]) for p, m in pairs)
    assert all(np.all(p[m] != 0) for p, m in pairs)


def test_metrics_describe_the_topology(whole_run):
    metrics, workdir, _ = whole_run
    topology = metrics["topology"]
    masks = [np.asarray(m) for m in jax.tree.leaves(_final(workdir).masks) if m.ndim]
    assert len(topology["layers"]) == len(masks) == 3
    assert topology["weights"] == sum(int(m.sum()) for m in masks)
    assert 0 < topology["nodes"] <= sum(m.shape[-1] for m in masks)
    assert sorted(layer["outputs"] for layer in topology["layers"]) == sorted(
        m.shape[-1] for m in masks
    )


def test_the_run_reports_each_stage_and_epoch(whole_run):
    reports = [(stage, done, total) for stage, done, total, _ in whole_run[2]]
    pruning = [(done, total) for stage, done, total in reports if stage == "prune"]
    epochs = [("train", done, 4) for done in range(5)]
    assert [report for report in reports if report[0] != "prune"] == [("start", 0, 4), *epochs]
    assert pruning[0] == (0, 1)
    assert pruning == sorted(pruning)
    assert reports[1 : 1 + len(pruning)] == [("prune", *step) for step in pruning]


def test_a_resumed_run_ends_with_bitwise_the_same_state(whole_run, tmp_path):
    def interrupt(stage, done, *_):
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(TINY, tmp_path, report=interrupt, checkpoint_seconds=0.0)
    stages = []
    metrics = train.train_and_evaluate(
        TINY, tmp_path, report=lambda stage, done, *_: stages.append((stage, done))
    )
    assert stages == [("start", 0), ("train", 2), ("train", 3), ("train", 4)]
    assert metrics["history"] == whole_run[0]["history"]
    assert metrics["topology"] == whole_run[0]["topology"]
    expected, found = _final(whole_run[1]), _final(tmp_path)
    assert jax.tree.structure(expected.state) == jax.tree.structure(found.state)
    jax.tree.map(np.testing.assert_array_equal, expected.state, found.state)
    jax.tree.map(np.testing.assert_array_equal, expected.masks, found.masks)


def test_the_seconds_of_a_job_are_those_of_all_its_processes(tmp_path):
    def slow(stage, done, *_):
        time.sleep(0.5)
        if stage == "train" and done == 2:
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train.train_and_evaluate(TINY, tmp_path, report=slow, checkpoint_seconds=0.0)
    first = time.monotonic() - begin
    metrics = train.train_and_evaluate(TINY, tmp_path)
    both = time.monotonic() - begin
    # From its start to the last checkpoint, which is 0.5 s before the end of the first.
    assert first - 1.0 < metrics["seconds"] <= both
    assert metrics["seconds"] > metrics["train_seconds"] + metrics["prune_seconds"]


def test_a_run_that_diverges_ends_there_and_reports_no_accuracy(tmp_path):
    config = dataclasses.replace(TINY, learning_rate=1e30, epochs=3)
    metrics = train.train_and_evaluate(config, tmp_path)
    assert metrics["diverged"] == len(metrics["history"])
    assert metrics["diverged"] < 3
    assert np.isnan(metrics["test_accuracy"])
    assert np.isnan(metrics["best_test_accuracy"])


@pytest.mark.parametrize("place", ["state", "masks", "document"])
def test_a_damaged_checkpoint_is_not_resumed(whole_run, tmp_path, place):
    """One bit at a time, in each file of the state, of the masks, and of the progress."""
    folder = tmp_path / "run"
    damaged = 0
    for file in sorted(whole_run[1].rglob("*")):
        inside = file.relative_to(whole_run[1])
        if not file.is_file() or place not in inside.parts or file.stat().st_size < 100:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole_run[1], folder)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        (folder / inside).write_bytes(content)
        refused = None
        try:
            metrics = train.train_and_evaluate(TINY, folder)
        except ConfigError as error:
            refused = str(error)
            damaged += 1
        # There are bytes that nothing reads.
        assert metrics == whole_run[0] if refused is None else "is damaged" in refused
    assert damaged


def test_a_checkpoint_of_other_code_is_dropped(tmp_path):
    first = train.train_and_evaluate(TINY, tmp_path, job={"code": "one"})
    stages = []
    again = train.train_and_evaluate(
        TINY, tmp_path, job={"code": "two"}, report=lambda stage, *_: stages.append(stage)
    )
    assert "prune" in stages
    assert again["history"] == first["history"]
    stages.clear()
    train.train_and_evaluate(
        TINY, tmp_path, job={"code": "two"}, report=lambda stage, *_: stages.append(stage)
    )
    assert "prune" not in stages


def test_a_finished_run_is_not_trained_again(whole_run):
    metrics, workdir, _ = whole_run
    assert train.train_and_evaluate(TINY, workdir) == metrics


def test_a_folder_of_another_job_is_refused(whole_run):
    other = dataclasses.replace(TINY, seed=1)
    with pytest.raises(ConfigError, match=r"holds a checkpoint of another job, .*seed=0"):
        train.train_and_evaluate(other, whole_run[1])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dataset", "mnits", r"dataset must be one of"),
        ("model", "resnet", r"model must be one of"),
        ("method", "magic", r"method must be one of .*'dpai'.*; got 'magic'"),
        ("batch_size", 1258, r"batch_size must not exceed the 1257 training images; got 1258"),
        ("sparsity", 1.5, r"sparsity must lie in \[0, 1\); got 1.5"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_it_starts(tmp_path, field, value, message):
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(dataclasses.replace(TINY, **{field: value}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_last_epoch_and_the_best_by_validation_are_both_reported():
    history = [
        {"train_loss": 3.0, "validation_accuracy": 0.2, "test_accuracy": 0.3},
        {"train_loss": 2.0, "validation_accuracy": 0.6, "test_accuracy": 0.5},
        {"train_loss": 1.0, "validation_accuracy": 0.6},
        {"train_loss": 0.5, "validation_accuracy": 0.4, "test_accuracy": 0.9},
    ]
    assert train.summarize(history) == {
        "test_accuracy": 0.9,
        "validation_accuracy": 0.4,
        "train_loss": 0.5,
        "best_epoch": 2,
        "best_validation_accuracy": 0.6,
        "best_test_accuracy": 0.5,
    }


def test_the_check_finds_a_weight_that_came_back_and_a_wrong_count():
    masks = {"kernel": jnp.array([[True, False], [False, False]]), "bias": jnp.array(True)}
    params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 0.0]]), "bias": jnp.ones(2)}
    train.check_pruned(params, masks, 1)
    with pytest.raises(RuntimeError, match="keep 1 weights where 2 were asked for"):
        train.check_pruned(params, masks, 2)
    revived = params | {"kernel": jnp.array([[2.0, 0.0], [1e-30, 0.0]])}
    with pytest.raises(RuntimeError, match="1 pruned weights are not zero"):
        train.check_pruned(revived, masks, 1)


def test_the_optimizer_is_sgd_with_momentum_decay_warmup_and_cosine():
    optimizer = steps.Optimizer(0.4, momentum=0.9, weight_decay=0.01, warmup_steps=2, steps=6)
    masks = {"kernel": jnp.array([[True, False, True]])}
    params = {"kernel": jnp.array([[1.0, 0.0, -2.0]])}
    transformation = optimizer.under(masks)
    state = transformation.init(params)
    expected, velocity = np.array([[1.0, 0.0, -2.0]]), np.zeros((1, 3))
    mask = np.array([[1.0, 0.0, 1.0]])
    cosine = [0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    for step, factor in enumerate([0.0, 0.5, *cosine]):
        gradient = np.array([[0.3, 5.0, -0.1 * step]])
        velocity = 0.9 * velocity + (gradient + 0.01 * expected) * mask
        expected = expected - 0.4 * factor * velocity
        grads = {"kernel": jnp.asarray(gradient, jnp.float32)}
        updates, state = transformation.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


TRACED = []


class Counted(nn.Module):
    """A linear network without batch statistics that notes when it is traced."""

    @nn.compact
    def __call__(self, x, train):
        TRACED.append(train)
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


def _linear_state(optimizer, keep_rows):
    variables = steps.initialize(Counted(), 0, (8, 8, 1))
    kept = jnp.broadcast_to(jnp.arange(64)[:, None] < keep_rows, (64, 10))
    masks = {"head": {"kernel": kept, "bias": jnp.array(True)}}
    return steps.start(optimizer, variables, masks)


def test_jobs_that_differ_in_their_masks_share_one_compiled_step(digits):
    optimizer = steps.Optimizer(0.1, momentum=0.9, weight_decay=0.0, warmup_steps=0, steps=3)
    images, labels = digits.normalized(digits.train.images[:32]), digits.train.labels[:32]
    states = [_linear_state(optimizer, keep_rows) for keep_rows in (20, 40)]
    TRACED.clear()
    for keep_rows, state in zip((20, 40), states, strict=True):
        after, _ = steps.train_step(Counted(), optimizer, state, images, labels)
        kernel = after.params["head"]["kernel"]
        assert not np.any(kernel[keep_rows:])
        assert np.any(kernel[:keep_rows])
    assert TRACED == [True]


def test_jobs_that_share_a_network_share_its_trace():
    jobs = [
        train.resolve(TINY),
        train.resolve(dataclasses.replace(TINY, seed=5, method="magnitude", sparsity=0.5)),
        train.resolve(dataclasses.replace(TINY, width=4)),
    ]
    nets = [
        train.prune(job, steps.initialize(job.model, 0, (8, 8, 1)), lambda *_: None).net
        for job in jobs
    ]
    assert nets[0] is nets[1]
    assert nets[0] is not nets[2]


def test_accuracy_is_the_fraction_of_right_labels_whatever_the_batch(digits):
    optimizer = steps.Optimizer(0.1, momentum=0.9, weight_decay=0.0, warmup_steps=0, steps=3)
    state = _linear_state(optimizer, 64)
    head = jax.tree.map(np.asarray, state.params["head"])
    images = np.asarray(digits.normalized(digits.test.images))
    logits = images.reshape(360, 64) @ head["kernel"] + head["bias"]
    expected = np.mean(logits.argmax(-1) == digits.test.labels)
    for batch_size in (7, 64, 400):
        feed = datasets.feed(digits, digits.test, batch_size, mesh=mesh_of(1))
        assert train.accuracy(Counted(), state, feed) == expected


class Normed(nn.Module):
    """A hidden layer with batch normalization and a head, which compile in a moment."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(self.width, use_bias=False)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(self.num_classes)(nn.relu(x))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dense"])
def test_every_method_prunes_a_network_of_the_experiments(name, monkeypatch):
    """Two steps of each that takes steps; the loss is that of training."""
    monkeypatch.setitem(models.MODELS, "normed", Normed)
    config = dataclasses.replace(TINY, model="normed", method=name, sparsity=0.7, width=3, epochs=1)
    job = train.resolve(config)
    method = job.pruning.method
    if not callable(method) and hasattr(method, "steps"):
        short = dataclasses.replace(method, steps=2)
        job = dataclasses.replace(job, pruning=dataclasses.replace(job.pruning, method=short))
    variables = steps.initialize(job.model, 0, job.data.image_shape)
    result = train.prune(job, variables, lambda *_: None)
    masks = jax.tree.leaves(result.masks["params"])
    sizes = [m.size for m in masks if m.ndim]
    assert sum(int(m.sum()) for m in masks if m.ndim) == round(0.3 * sum(sizes))
    assert jax.tree.structure(result.masks) == jax.tree.structure(variables)


def test_a_lottery_ticket_needs_no_batch_normalization():
    job = train.resolve(
        dataclasses.replace(TINY, model="mlp", method="imp", sparsity=0.3, epochs=1)
    )
    variables = steps.initialize(job.model, 0, job.data.image_shape)
    assert set(variables) == {"params"}
    result = train.prune(job, variables, lambda *_: None)
    assert result.topology.density == pytest.approx(0.7, abs=0.01)
    trained = train.train_variables(job, variables, result.masks)
    assert jax.tree.structure(trained) == jax.tree.structure(variables)


def test_shuffled_masks_have_the_densities_of_those_they_were_made_of():
    def layers(name):
        config = dataclasses.replace(TINY, method=name, sparsity=0.7)
        job = train.resolve(config)
        variables = steps.initialize(job.model, 0, job.data.image_shape)
        return train.prune(job, variables, lambda *_: None)

    plain, shuffled = layers("magnitude"), layers("magnitude+shuffled")
    assert [layer.weights for layer in plain.topology.layers] == [
        layer.weights for layer in shuffled.topology.layers
    ]
    assert shuffled.topology == dpai.topology(shuffled.net, shuffled.masks)
    pairs = zip(jax.tree.leaves(plain.masks), jax.tree.leaves(shuffled.masks), strict=True)
    assert any(np.any(a != b) for a, b in pairs)


def test_any_seed_of_32_bits_draws_weights():
    for seed in (0, 2**32 - 1):
        job = train.resolve(dataclasses.replace(TINY, seed=seed))
        assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(train.initial_variables(job)))


@pytest.mark.parametrize("how", ["fresh", "permuted", "largest"])
def test_controls_keep_the_masks_and_change_the_weights(how):
    config = dataclasses.replace(TINY, method=f"random+{how}", sparsity=0.7)
    job = train.resolve(config)
    before = train.initial_variables(job)
    result = train.prune(job, before, lambda *_: None)
    plain = train.prune(
        train.resolve(dataclasses.replace(config, method="random")), before, lambda *_: None
    )
    jax.tree.map(np.testing.assert_array_equal, result.masks, plain.masks)
    after = train.changed_weights(job, before, result.masks)
    leaves = zip(*map(jax.tree.leaves, (before, after, result.masks)), strict=True)
    for old, new, mask in leaves:
        if not mask.ndim:
            np.testing.assert_array_equal(new, old)
            continue
        old, kept = np.asarray(old), np.asarray(new)[np.asarray(mask)]
        among = old[np.asarray(mask)]
        if how == "largest":
            among = sorted(old.ravel().tolist(), key=abs)[-kept.size :]
        assert (sorted(kept.tolist()) == sorted(np.asarray(among).tolist())) == (how != "fresh")
        assert np.any(kept != old[np.asarray(mask)])


def test_the_loss_that_methods_prune_by_divides_logits_by_a_temperature(digits):
    job = train.resolve(TINY)
    variables = steps.initialize(job.model, 0, job.data.image_shape)
    images, labels = digits.normalized(digits.train.images[:20]), digits.train.labels[:20]
    logits, _ = job.model.apply(variables, images, train=True, mutable=["batch_stats"])
    for temperature in (1.0, 200.0):
        scaled = np.asarray(logits, np.float64) / temperature
        expected = np.mean(np.log(np.exp(scaled).sum(1)) - scaled[np.arange(20), labels])
        loss = steps.pruning_loss(job.model, temperature)(variables, (images, labels))
        assert float(loss) == pytest.approx(expected, rel=1e-5)

"""Each optimizer against its definition, in NumPy and float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import datasets, models, steps, train
from experiments.config import Config
from tests.support.meshes import mesh_of

# Optax's schedules promote their integer step count.
pytestmark = pytest.mark.standard_promotion

MASK = np.array([1.0, 0.0, 1.0])


def _gradient(step):
    return np.array([0.3, 5.0, -0.1 * step])


def _weights_after(optimizer, number):
    """The kernel and the bias, which no mask prunes, after so many steps."""
    params = {"kernel": jnp.array([1.0, 0.0, -2.0]), "bias": jnp.array([1.0, 3.0, -2.0])}
    masks = {"kernel": jnp.asarray(MASK > 0), "bias": jnp.array(True)}
    transformation = optimizer.under(masks)
    state = transformation.init(params)
    for step in range(number):
        gradient = jnp.asarray(_gradient(step), jnp.float32)
        updates, state = transformation.update(
            {"kernel": gradient, "bias": gradient}, state, params
        )
        params = jax.tree.map(jnp.add, params, updates)
    return params["kernel"], params["bias"]


def _rate(step, peak, warmup, total, drops):
    """The learning rate of a step, the first being 0."""
    if step < warmup:
        return peak * step / warmup
    if drops:
        return peak * 0.1 ** sum(step >= drop for drop in drops)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize(("warmup", "drops"), [(0, ()), (2, ()), (0, (3, 6)), (2, (3, 6))])
def test_the_learning_rate_rises_along_a_line_and_falls_in_tenths_or_a_cosine(warmup, drops):
    optimizer = steps.Optimizer(0.4, 0.9, 0.0, warmup, 8, drops)
    found = [float(optimizer.schedule()(step)) for step in range(8)]
    expected = [_rate(step, 0.4, warmup, 8, drops) for step in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sgd_adds_the_decay_of_all_weights_to_the_gradients_and_then_has_momentum():
    found = _weights_after(steps.Optimizer(0.4, 0.9, 0.01, 0, 7, (3, 5)), 7)
    for weights, start, mask in zip(
        found, ([1.0, 0.0, -2.0], [1.0, 3.0, -2.0]), (MASK, np.ones(3)), strict=True
    ):
        expected, velocity = np.array(start), np.zeros(3)
        for step in range(7):
            velocity = 0.9 * velocity + (_gradient(step) + 0.01 * expected) * mask
            expected = expected - _rate(step, 0.4, 0, 7, (3, 5)) * velocity
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_adamw_decays_all_weights_apart_from_the_gradients():
    found = _weights_after(steps.Optimizer(0.02, 0.9, 0.1, 2, 6, name="adamw"), 6)
    for weights, start, mask in zip(
        found, ([1.0, 0.0, -2.0], [1.0, 3.0, -2.0]), (MASK, np.ones(3)), strict=True
    ):
        expected, first, second = np.array(start), np.zeros(3), np.zeros(3)
        for step in range(6):
            gradient = _gradient(step) * mask
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            unbiased = first / (1 - 0.9 ** (step + 1))
            deviation = np.sqrt(second / (1 - 0.999 ** (step + 1)))
            direction = unbiased / (deviation + 1e-8) + 0.1 * expected
            expected = expected - _rate(step, 0.02, 2, 6, ()) * direction
        np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_a_configuration_counts_in_epochs_what_the_optimizer_counts_in_steps():
    config = Config(model="mlp", epochs=10, batch_size=125, warmup=0.2, drops=(4, 7))
    # Digits have 1257 images for training.
    optimizer = train.resolve(config).optimizer
    assert (optimizer.steps, optimizer.warmup_steps, optimizer.drops) == (100, 20, (40, 70))
    assert optimizer.name == "sgd"


def test_a_network_is_pruned_and_trained_on_resized_images():
    config = Config(model="mlp", width=8, image_size=12, method="snip", sparsity=0.5)
    job = train.resolve(config)
    variables = train.initial_variables(job)
    result = train.prune(job, variables, lambda *_: None)
    assert result.topology.weights == (144 * 8 + 8 * 8 + 8 * 10) // 2
    state = steps.start(job.optimizer, variables, result.masks["params"])
    images, labels = job.data.train.images[:64], job.data.train.labels[:64]
    assert images.shape[1:3] == (8, 8)
    after, _ = steps.train_step(job.model, job.optimizer, state, images, labels)
    kernel = after.params["hidden1"]["kernel"]
    assert kernel.shape == (144, 8)
    assert not np.any(np.asarray(kernel)[~np.asarray(result.masks["params"]["hidden1"]["kernel"])])


def test_an_epoch_in_one_program_is_its_steps_one_by_one(digits):
    model = models.create("lenet", 10, 12)
    optimizer = steps.Optimizer(0.1, 0.9, 1e-3, warmup_steps=2, steps=8)
    variables = steps.initialize(model, 0, digits.image_shape)
    rng = np.random.default_rng(0)
    masks = jax.tree.map(lambda w: rng.random(w.shape) < 0.5, variables["params"])
    feed = datasets.feed(digits, digits.train, 300, mesh=mesh_of(1), augmentation="shift")
    start = steps.start(optimizer, variables, masks)
    state, losses = start, []
    for batch in feed.epoch(1):
        state, metrics = steps.train_step(model, optimizer, state, *batch)
        losses.append(float(metrics["train_loss"]))
    whole, metrics = steps.train_epoch(model, optimizer, start, *feed.epoch_inside(1))
    np.testing.assert_allclose(metrics["train_loss"], losses, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("platform", "name", "one"),
    [("cpu", "lenet", True), ("cpu", "lenet5", False), ("gpu", "lenet5", True)],
)
def test_convolutions_on_cpus_stay_outside_of_a_loop(monkeypatch, platform, name, one):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    steps.belong_in_one_program.cache_clear()
    model = models.create(name, 10, 4)
    assert steps.belong_in_one_program(model, (28, 28, 1), jnp.float32) == one
    steps.belong_in_one_program.cache_clear()

"""What training computes: the state, the optimizer and the jitted steps, all pure functions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import Partial

import dpai_jax as dpai
from experiments import cpu


class TrainState(flax.struct.PyTreeNode):
    """Everything that a training step reads and writes.

    Attributes:
        params: Weights; the pruned ones are exactly 0.
        batch_stats: Running statistics of batch normalization; empty if there are none.
        opt_state: State of the optimizer.
        masks: Pytree parallel to `params`: which weights are kept. Never changes.
    """

    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    masks: Any


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How weights are updated. Hashable, so that jobs with equal settings share a compiled step.

    Attributes:
        learning_rate: Peak learning rate.
        momentum: Momentum of SGD.
        weight_decay: Decay of all parameters, for SGD added to the gradients, for AdamW decoupled.
        warmup_steps: Steps in which the learning rate rises linearly from zero.
        steps: Total number of steps.
        drops: Steps after which the learning rate falls to a tenth; if empty, it falls to zero
            along a cosine.
        name: One of `config.OPTIMIZERS`.
    """

    learning_rate: float
    momentum: float
    weight_decay: float
    warmup_steps: int
    steps: int
    drops: tuple[int, ...] = ()
    name: str = "sgd"

    def schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the steps done."""
        rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps)
        if self.drops:
            tenths = {step - self.warmup_steps: 0.1 for step in self.drops}
            fall = optax.piecewise_constant_schedule(self.learning_rate, tenths)
        else:
            fall = optax.cosine_decay_schedule(self.learning_rate, self.steps - self.warmup_steps)
        return optax.join_schedules([rise, fall], [self.warmup_steps])

    def under(self, masks: Any) -> optax.GradientTransformation:
        """Returns the optax optimizer, which keeps pruned weights at 0."""
        if self.name == "adamw":
            dense = optax.adamw(self.schedule(), weight_decay=self.weight_decay)
        else:
            sgd = optax.sgd(self.schedule(), self.momentum)
            dense = optax.chain(optax.add_decayed_weights(self.weight_decay), sgd)
        return dpai.keep_pruned(dense, masks)


@functools.partial(jax.jit, static_argnames=("model", "image_shape", "dtype"))
def initialize(
    model: nn.Module,
    seed: jax.typing.ArrayLike,
    image_shape: tuple[int, ...],
    dtype: Any = jnp.float32,
) -> Any:
    """Returns the network's variables: "params" and, if it has them, "batch_stats"."""
    # The default generator would be compiled for each kernel, which takes three times as long.
    key = jax.random.key(seed, impl="rbg")
    return model.init(key, jnp.zeros((1, *image_shape), dtype), train=False)


def start(optimizer: Optimizer, variables: Any, masks: Any) -> TrainState:
    """Returns the state before the first step."""
    params = dpai.apply_masks(variables["params"], masks)
    opt_state = optimizer.under(masks).init(params)
    return TrainState(params, batch_stats(variables), opt_state, masks)


def train_step(
    model: nn.Module, optimizer: Optimizer, state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step. The masks are data, so jobs with different masks share one program.

    Call it from Python, not inside another transformation (see `belong_in_one_program`).
    """
    return _jitted(_step)(model, optimizer, state, images, labels)


def train_epoch(
    model: nn.Module, optimizer: Optimizer, state: TrainState, batch_of: Partial, each: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes the steps of an epoch in one program.

    Args:
        model: The network.
        optimizer: How its weights are updated.
        state: The state before the first step.
        batch_of: Returns the batch of a step.
        each: Its arguments for all steps: arrays whose first axis is over the steps.

    Returns:
        The state after the last step, and the metrics of each step.
    """
    return _jitted(_epoch)(model, optimizer, state, batch_of, each)


@functools.lru_cache
def belong_in_one_program(model: nn.Module, image_shape: tuple[int, ...], dtype: Any) -> bool:
    """Whether to run the steps of an epoch in one program: always, except convolutions on CPUs.

    A step of a small network takes less time than starting a program. But inside `lax.scan` XLA
    runs convolutions on a single CPU core.
    """
    if jax.default_backend() != "cpu":
        return True
    x = jax.ShapeDtypeStruct((1, *image_shape), dtype)
    variables = jax.eval_shape(lambda: initialize(model, 0, image_shape, dtype))
    return "conv_general_dilated" not in str(jax.make_jaxpr(in_training(model))(variables, x))


# Called at the first step, not at import, as asking for the platform starts JAX's backend.
@functools.cache
def _jitted(function: Callable[..., Any]) -> Any:
    options = cpu.compiler_options()
    return jax.jit(function, static_argnames=("model", "optimizer"), compiler_options=options)


def _epoch(
    model: nn.Module, optimizer: Optimizer, state: TrainState, batch_of: Partial, each: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    return lax.scan(lambda s, drawn: _step(model, optimizer, s, *batch_of(drawn)), state, each)


def _step(
    model: nn.Module, optimizer: Optimizer, state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return cross_entropy(logits, labels), (logits, batch_stats(updated))

    (loss, (logits, statistics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    transformation = optimizer.under(state.masks)
    updates, opt_state = transformation.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {"train_loss": loss, "train_accuracy": jnp.mean(logits.argmax(-1) == labels)}
    return TrainState(params, statistics, opt_state, state.masks), metrics


def cross_entropy(logits: jax.Array, labels: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Returns the mean cross-entropy, in float32, of logits divided by a temperature."""
    scaled = logits.astype(jnp.float32) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(scaled, labels).mean()


# Cached, so that jobs get the same function, and share what is compiled for it.
@functools.lru_cache
def in_training(model: nn.Module) -> Callable[[Any, Any], jax.Array]:
    """Returns the network as a function of variables and images, with norms over the batch."""

    def fn(variables: Any, images: Any) -> jax.Array:
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return logits

    return fn


@functools.lru_cache
def pruning_loss(model: nn.Module, temperature: float) -> Callable[[Any, Any], jax.Array]:
    """Returns the loss that methods prune by: the training loss of logits over a temperature."""

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        images, labels = batch
        logits = in_training(model)(variables, images)
        return cross_entropy(logits, labels, temperature)

    return loss_fn


@functools.partial(jax.jit, static_argnames="model")
def count_correct(
    model: nn.Module, state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns how many labels the network predicts correctly, and how many there are.

    Norms use their running statistics. Labels of -1 don't count.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = model.apply(variables, images, train=False)
    return jnp.sum(logits.argmax(-1) == labels), jnp.sum(labels >= 0)


def batch_stats(variables: Any) -> Any:
    """Returns the running statistics among a network's variables; empty if it has none."""
    return variables.get("batch_stats", {})

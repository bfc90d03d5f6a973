"""Loops, branches and function transformations around plain layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.support.networks.case import Built, Case, expand, normal, parameters

Params = dict[str, jax.Array]


def scanned_layers() -> Built:
    """`lax.scan` over stacked kernels and biases."""
    params = {
        "layers": parameters(up=(3, 6, 8), up_bias=(3, 8), down=(3, 8, 6)),
        **parameters(head=(6, 4)),
    }

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, jax.Array]:
        y = jax.nn.relu(x @ p["up"] + p["up_bias"][None, :]) @ p["down"]
        return x + y, jnp.mean(y)

    def fn(params: dict[str, Any], x: jax.Array) -> jax.Array:
        x, _ = lax.scan(layer, x, params["layers"])
        return x @ params["head"]

    return fn, params, normal(2, 6)


def indexed_layers() -> Built:
    """`lax.fori_loop` picking the kernel of each step from a stack."""
    params = parameters(stack=(3, 6, 6), head=(6, 4))

    def fn(params: Params, x: jax.Array) -> jax.Array:
        def layer(i: jax.Array, x: jax.Array) -> jax.Array:
            return x + jnp.tanh(x @ params["stack"][i])

        return lax.fori_loop(0, 3, layer, x) @ params["head"]

    return fn, params, normal(2, 6)


def lstm_parameters() -> Params:
    return parameters(input=(4, 24), recurrent=(6, 24), bias=(24,), head=(6, 3))


def lstm_cell(
    params: Params, carry: tuple[jax.Array, jax.Array], x: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    hidden, cell = carry
    gates = x @ params["input"] + hidden @ params["recurrent"] + params["bias"][None, :]
    i, g, f, o = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return (hidden, cell), hidden


def lstm_unrolled() -> Built:
    """The time steps in a Python loop over (batch, time, features)."""

    def fn(params: Params, x: jax.Array) -> jax.Array:
        carry = (jnp.zeros((x.shape[0], 6)), jnp.zeros((x.shape[0], 6)))
        outputs = []
        for step in range(x.shape[1]):
            carry, output = lstm_cell(params, carry, x[:, step])
            outputs.append(output)
        return jnp.stack(outputs, axis=1) @ params["head"]

    return fn, lstm_parameters(), normal(2, 4, 4)


def lstm_scanned() -> Built:
    """The same function of the same parameters as `lstm_unrolled`, by `lax.scan`."""

    def fn(params: Params, x: jax.Array) -> jax.Array:
        carry = (jnp.zeros((x.shape[0], 6)), jnp.zeros((x.shape[0], 6)))
        _, outputs = lax.scan(partial(lstm_cell, params), carry, jnp.swapaxes(x, 0, 1))
        return jnp.swapaxes(outputs, 0, 1) @ params["head"]

    return fn, lstm_parameters(), normal(2, 4, 4)


def branches() -> Built:
    """`lax.cond` on a property of the input: a dense layer or two."""
    params = parameters(stem=(6, 8), wide=(8, 8), first=(8, 4), second=(4, 8), head=(8, 3))

    def shallow(params: Params, x: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ params["wide"])

    def deep(params: Params, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(x @ params["first"]) @ params["second"]

    def fn(params: Params, x: jax.Array) -> jax.Array:
        y = jax.nn.relu(x @ params["stem"])
        return lax.cond(jnp.mean(x) > 0, shallow, deep, params, y) @ params["head"]

    return fn, params, normal(2, 6)


def layer_kinds() -> Built:
    """`lax.switch` inside `lax.scan`: each step's number picks the kind of its layer."""
    params = parameters(tokens=(5, 5), channels=(6, 6), both=(5, 6, 6), head=(6, 3))
    kinds = (
        lambda params, x: x + jnp.einsum("st,btd->bsd", params["tokens"], jax.nn.relu(x)),
        lambda params, x: x + jax.nn.relu(x) @ params["channels"],
        lambda params, x: jnp.einsum("btd,tde->bte", jnp.tanh(x), params["both"]),
    )

    def fn(params: Params, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, kind: jax.Array) -> tuple[jax.Array, None]:
            return lax.switch(kind, kinds, params, x), None

        x, _ = lax.scan(step, x, jnp.asarray([0, 1, 2, 1]))
        return jnp.mean(x, axis=1) @ params["head"]

    return fn, params, normal(2, 5, 6)


@jax.custom_jvp
def soft_clip(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)) with a derivative that doesn't overflow."""
    return jnp.logaddexp(x, 0.0)


@soft_clip.defjvp
def _soft_clip_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return soft_clip(primals[0]), jax.nn.sigmoid(primals[0]) * tangents[0]


@jax.custom_vjp
def binary_activation(x: jax.Array) -> jax.Array:
    """Rounding to {-1, 1} in the forward pass, with the gradient of clipping."""
    return jnp.clip(x, -1.0, 1.0) + lax.stop_gradient(jnp.sign(x) - jnp.clip(x, -1.0, 1.0))


def _binary_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return binary_activation(x), x


def _binary_backward(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(jnp.abs(x) <= 1.0, cotangent, 0.0),)


binary_activation.defvjp(_binary_forward, _binary_backward)


def custom_gradients() -> Built:
    """Activations with a `jax.custom_jvp` and a `jax.custom_vjp`."""
    params = parameters(first=(6, 12), second=(12, 12), third=(12, 3))

    def fn(params: Params, x: jax.Array) -> jax.Array:
        x = soft_clip(x @ params["first"])
        return binary_activation(x @ params["second"]) @ params["third"]

    return fn, params, normal(4, 6)


def compiled_and_checkpointed() -> Built:
    """A jitted sub-function called twice, and a checkpointed one around it."""
    params = parameters(first=(6, 6), second=(6, 6), third=(6, 8), head=(8, 3))

    @partial(jax.jit, static_argnames="slope")
    def dense(kernel: jax.Array, x: jax.Array, slope: float = 0.1) -> jax.Array:
        return jax.nn.leaky_relu(x @ kernel, slope)

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    def block(params: Params, x: jax.Array) -> jax.Array:
        return x + dense(params["second"], dense(params["first"], x, slope=0.2))

    def fn(params: Params, x: jax.Array) -> jax.Array:
        return dense(params["third"], block(params, x)) @ params["head"]

    return fn, params, normal(2, 6)


def two_inputs_two_outputs() -> Built:
    """A siamese encoder of both inputs, a class of each and their cosine similarity."""
    params = parameters(encoder=(6, 8), shared=(8, 8), classes=(8, 3), bilinear=(8, 8))

    def encode(params: Params, x: jax.Array) -> jax.Array:
        x = jax.nn.elu(x @ params["encoder"])
        return jax.nn.elu(jax.nn.elu(x @ params["shared"]) @ params["shared"])

    def fn(
        params: Params, x: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        left, right = (encode(params, side) for side in x)
        classes = left @ params["classes"], right @ params["classes"]
        right = right @ params["bilinear"]
        norms = jnp.linalg.norm(left, axis=-1) * jnp.linalg.norm(right, axis=-1)
        return classes, jnp.sum(left * right, axis=-1) / (norms + 1e-6)

    return fn, params, (normal(2, 6), normal(2, 6, seed=2))


CASES = (
    Case(
        "plain/scanned_layers",
        scanned_layers,
        expand("layers/{up,down}", "head"),
        free=expand("layers/up_bias"),
    ),
    Case("plain/indexed_layers", indexed_layers, expand("{stack,head}")),
    Case("plain/lstm_unrolled", lstm_unrolled, expand("{input,recurrent,head}")),
    Case("plain/lstm_scanned", lstm_scanned, expand("{input,recurrent,head}")),
    Case("plain/branches", branches, expand("{stem,wide,first,second,head}")),
    Case("plain/layer_kinds", layer_kinds, expand("{tokens,channels,both,head}")),
    Case("plain/custom_gradients", custom_gradients, expand("{first,second,third}")),
    Case(
        "plain/compiled_and_checkpointed",
        compiled_and_checkpointed,
        expand("{first,second,third,head}"),
    ),
    Case(
        "plain/two_inputs_two_outputs",
        two_inputs_two_outputs,
        expand("{encoder,shared,classes,bilinear}"),
    ),
)

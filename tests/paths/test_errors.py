"""Bad input to tracing and counting raises at once, in one sentence that names it and its value."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl

import dpai_jax as dpai

Params = dict[str, Any]

PARAMS: Params = {"hidden": jnp.ones((3, 4)), "bias": jnp.ones((4,)), "out": jnp.ones((4, 2))}
MASKS: Params = {"hidden": np.ones((3, 4), bool), "bias": True, "out": np.ones((4, 2), bool)}
X = jnp.ones((5, 3))


def network(params: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["hidden"] + params["bias"][None]) @ params["out"]


def message(error: type[Exception], call: Callable[[], Any]) -> str:
    """What a call raises, which must be one line: no dump of an array, no list of advice."""
    with pytest.raises(error) as raised:
        call()
    text = str(raised.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("fn", [None, PARAMS["hidden"].tolist(), "network"])
def test_fn_that_is_not_callable(fn: Any) -> None:
    text = message(TypeError, lambda: dpai.trace(fn, PARAMS, X))
    shown = repr(fn) if not isinstance(fn, list) else "a list of 12 leaves"
    assert text == f"fn must be a function fn(params, x), got {shown}"


@pytest.mark.parametrize("leaf", ["relu", jnp.tanh])
@pytest.mark.parametrize("argument", ["params", "x"])
def test_leaf_that_is_not_an_array(argument: str, leaf: Any) -> None:
    arguments = {"params": PARAMS, "x": {"image": X}}
    arguments[argument] = arguments[argument] | {"extra": leaf}
    text = message(TypeError, lambda: dpai.trace(lambda p, x: network(p, x["image"]), **arguments))
    assert text == f"{argument} must be a pytree of arrays, but its leaf extra is {leaf!r}"


@pytest.mark.parametrize(
    ("fn", "params"),
    [
        (lambda params, x: x, {}),
        (lambda params, x: x * params["bias"][None, :3], PARAMS),
        (lambda params, x: x + (params["hidden"] @ params["out"])[None, :, 0], PARAMS),
        (lambda params, x: x @ params["codes"].astype(float), {"codes": jnp.ones((3, 4), int)}),
    ],
    ids=["no parameters", "only biases used", "kernels beside the input", "integers"],
)
def test_no_prunable_leaf(fn: Any, params: Params) -> None:
    text = message(ValueError, lambda: dpai.trace(fn, params, X))
    assert text.startswith("params has no prunable leaf")
    assert "two or more dimensions" in text


def test_prunable_that_accepts_no_leaf() -> None:
    text = message(
        ValueError, lambda: dpai.trace(network, PARAMS, X, prunable=lambda name, leaf: False)
    )
    assert text.startswith("params has no prunable leaf")
    assert "prunable accepts" in text


@pytest.mark.parametrize(
    "fn",
    [
        lambda params, x: params["hidden"] @ params["out"],
        lambda params, x: jnp.argmax(network(params, x), axis=-1),
        lambda params, x: network(params, x) > 0,
        lambda params, x: (),
    ],
    ids=["of parameters alone", "an index", "a comparison", "nothing"],
)
def test_output_that_does_not_depend_on_x(fn: Any) -> None:
    text = message(ValueError, lambda: dpai.trace(fn, PARAMS, X))
    assert text.startswith("fn's output does not depend on x")


@pytest.mark.parametrize("gates", ["paper", None, "Balanced"])
def test_unknown_gates(gates: Any) -> None:
    text = message(ValueError, lambda: dpai.trace(network, PARAMS, X, gates=gates))
    assert text == f"gates must be one of balanced, jacobian, signal, got {gates!r}"


@pytest.fixture(scope="module")
def net() -> dpai.Network:
    return dpai.trace(network, PARAMS, X)


each_count = pytest.mark.parametrize(
    "count", [dpai.log_paths, dpai.topology, dpai.effective_weights]
)


@each_count
@pytest.mark.parametrize(
    "masks",
    [None, list(MASKS.values()), {"hidden": MASKS["hidden"]}, MASKS | {"bias": None}],
    ids=["none", "a list", "a part", "a missing leaf"],
)
def test_masks_of_another_structure(net: dpai.Network, count: Any, masks: Any) -> None:
    text = message(ValueError, lambda: count(net, masks))
    assert text.startswith("masks must have the tree structure of params")
    assert text.endswith("has no leaf 'bias'")
    assert "PyTreeDef" not in text


@each_count
@pytest.mark.parametrize("mask", [np.ones((4, 3), bool), np.ones(12, bool), True])
def test_mask_of_another_shape(net: dpai.Network, count: Any, mask: Any) -> None:
    text = message(ValueError, lambda: count(net, MASKS | {"hidden": mask}))
    assert text == f"masks must have shape (3, 4) at hidden, got {np.shape(mask)}"


def double(x_ref: Any, y_ref: Any) -> None:
    y_ref[...] = 2 * x_ref[...]


def pooled(x: jax.Array) -> jax.Array:
    return jnp.sum(lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"))


# Operations on (5, 3) by the primitives of which docs/paths.md says that they raise.
RAISING: dict[str, Callable[[jax.Array], Any]] = {
    "select_and_scatter_add": jax.grad(pooled),
    "bitcast_convert_type": lambda x: lax.bitcast_convert_type(x, jnp.int32),
    "cholesky": lambda x: jnp.linalg.cholesky(x.T @ x),
    "eigh": lambda x: jnp.linalg.eigh(x.T @ x)[0],
    "svd": lambda x: jnp.linalg.svd(x, compute_uv=False),
    "qr": lambda x: jnp.linalg.qr(x)[0],
    "lu": lambda x: jnp.linalg.solve(x.T @ x, x.T),
    "triangular_solve": lambda x: jax.scipy.linalg.solve_triangular(x.T @ x, x.T),
    "custom_linear_solve": lambda x: lax.custom_linear_solve(
        lambda y: 2 * y, x, lambda matvec, y: y / 2, symmetric=True
    ),
    "pure_callback": lambda x: jax.pure_callback(lambda y: y, x, x),
    "io_callback": lambda x: io_callback(lambda y: y, x, x),
    "pallas_call": lambda x: pl.pallas_call(double, out_shape=x)(x),
    "while": lambda x: lax.while_loop(lambda x: jnp.sum(x) < 9, lambda x: x @ jnp.ones((3, 3)), x),
}


def test_the_documents_list_what_raises() -> None:
    document = (Path(__file__).parents[2] / "docs" / "paths.md").read_text()
    table = document.split("| primitive | why |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| ")]
    assert {name for row in rows for name in re.findall("`(\\w+)`", row)} == set(RAISING)


@pytest.mark.parametrize(
    ("primitive", "wrap"),
    [(name, jax.jit) for name in RAISING]
    + [("cholesky", wrap) for wrap in (lambda f: f, jax.checkpoint, jax.vmap)],
)
def test_primitive_without_path_semantics(primitive: str, wrap: Any) -> None:
    def fn(params: Params, x: jax.Array) -> jax.Array:
        return wrap(RAISING[primitive])(x @ params["hidden"])

    shape = (2, 5, 3) if wrap is jax.vmap else (5, 3)
    params = PARAMS | {"hidden": jnp.ones((3, 3))}
    text = message(NotImplementedError, lambda: dpai.trace(fn, params, jnp.ones(shape)))
    assert "while loop" in text if primitive == "while" else repr(primitive) in text
    assert re.search(rf"{re.escape(Path(__file__).name)}:\d+", text)
    assert ("jax.lax.scan" if primitive == "while" else "register_rule") in text


def test_primitive_without_path_semantics_is_fine_beside_the_input() -> None:
    def fn(params: Params, x: jax.Array) -> jax.Array:
        ranks = jnp.sort(params["bias"])
        return (x @ params["hidden"] + ranks[None]) @ params["out"]

    assert dpai.log_paths(dpai.trace(fn, PARAMS, X), MASKS) == pytest.approx(np.log(5 * 3 * 4 * 2))


@pytest.mark.parametrize("primitive", ["sort", None, lax.sort])
def test_rule_for_what_is_not_a_primitive(primitive: Any) -> None:
    text = message(TypeError, lambda: dpai.paths.register_rule(primitive))
    assert text == f"primitive must be a jax.extend.core.Primitive, got {primitive!r}"

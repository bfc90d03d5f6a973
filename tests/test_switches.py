"""JAX's switches for debugging and for other number types change nothing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai

SWITCHES = {
    "debug_infs": lambda: jax.debug_infs(True),
    "debug_nans": lambda: jax.debug_nans(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow"),
    "disable_jit": lambda: jax.disable_jit(),
    "x64": lambda: jax.enable_x64(True),
    "promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "ranks": lambda: jax.numpy_rank_promotion("raise"),
}
METHODS = [
    dpai.DPaI(steps=30),
    dpai.SNIP(),
    dpai.IterativeSNIP(steps=3),
    dpai.FORCE(steps=3),
    dpai.GraSP(),
    dpai.ProsPr(steps=2),
    dpai.SynFlow(steps=5),
    dpai.NTKSAP(steps=3),
    dpai.NPB(),
    dpai.PHEW(),
    dpai.Magnitude(),
    dpai.Random(),
]


@contextlib.contextmanager
def every_switch() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for switch in SWITCHES.values():
            stack.enter_context(switch())
        yield


def weights(seed: int) -> dict[str, jax.Array]:
    first, second = jax.random.split(jax.random.key(seed))
    return {"first": jax.random.normal(first, (8, 12)), "second": jax.random.normal(second, (6, 4))}


def new_network() -> Callable[[Any, jax.Array], jax.Array]:
    """A network that was never traced, half of whose first kernel nobody reads."""
    return lambda params, x: jax.nn.relu(x @ params["first"])[:, :6] @ params["second"]


def pruned(method: Any, switch: Callable[[], Any]) -> Any:
    fn, params, x = new_network(), weights(0), jnp.linspace(-1, 1, 40).reshape(5, 8)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.square(fn(params, batch)))

    key = jax.random.key(1)
    with switch():
        return dpai.prune(
            fn, params, x, 0.7, method=method, key=key, loss_fn=loss_fn, batches=[x], repair=True
        ).masks


@pytest.mark.filterwarnings("ignore:.* uses no data:UserWarning")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_masks_are_the_same_under_every_switch(method: Any) -> None:
    chex.assert_trees_all_equal(
        pruned(method, every_switch), pruned(method, contextlib.nullcontext)
    )


@pytest.mark.parametrize("name", SWITCHES)
def test_so_are_the_results_of_the_other_functions(name: str) -> None:
    fn, params, x, key = new_network(), weights(0), jnp.ones((1, 8)), jax.random.key(1)
    none = jax.tree.map(lambda w: jnp.zeros(w.shape, bool), params)

    def results() -> Any:
        net = dpai.trace(fn, params, x)
        keep = dpai.erk(net, 0.7)
        scores = jax.tree.map(jnp.add, params, dpai.ascent(net, params, keep))
        masks = dpai.repair(net, dpai.binarize(scores, keep), scores, key)
        topo = [dpai.topology(net, m) for m in (masks, none)]
        return (
            [(t.log_paths, t.weights, t.nodes, t.kernels, t.collapsed) for t in topo],
            dpai.log_paths(net, none),
            (keep, dpai.er(net, 0.7), dpai.uniform(net, 0.7), dpai.global_threshold(net, 0.7)),
            (masks, dpai.shuffled(masks, key), dpai.effective_weights(net, masks)),
            dpai.apply_masks(params, masks),
        )

    expected = results()
    assert expected[0][1][0] == expected[1] == -np.inf
    with SWITCHES[name]():
        found = results()
    chex.assert_trees_all_equal(found, expected)


def test_scores_are_float32_with_x64() -> None:
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: w.astype(jnp.float64), weights(0))
        fn = new_network()
        for method in (dpai.SNIP(), dpai.ProsPr(steps=2)):
            scores = dpai.prune(
                fn,
                params,
                jnp.ones((5, 8)),
                0.7,
                method=method,
                loss_fn=lambda params, batch: jnp.mean(jnp.square(fn(params, batch))),
                batches=[jnp.ones((5, 8))],
            ).scores
            assert [s.dtype for s in scores.values()] == [jnp.float32, jnp.float32]

"""The zoo itself: its networks run, and its lists of prunable leaves are true."""

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.networks import CASES, Case, by_name
from tests.support.networks.case import Built, expand

# What the names of leaves of two or more dimensions say that are not prunable: added or multiplied
# elementwise, only looked up, or applied to a value that doesn't depend on the input.
FREE = re.compile(
    r"bias|b|offset|up_bias|q_bias|scale|layer_scale|norm\d?/weight|(key|gate)_mix|A_log"
    r"|pos_embedding|cls|probe|AttentionPooling_0/.*/query/kernel"
    r"|embedding|embeddings|(embedding|position)/weight"
)


@cache
def built(case: Case) -> Built:
    return case.make()


def named_leaves(params: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def is_floating(array: jax.Array) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def negated(x: Any) -> Any:
    """The other side of every threshold on a floating input; token ids stay."""
    return jax.tree.map(lambda a: -np.asarray(a) if is_floating(a) else a, x)


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def test_patterns_expand_to_every_combination() -> None:
    assert expand("a/{b,c}{,_1}", "d") == {"a/b", "a/b_1", "a/c", "a/c_1", "d"}


def test_names_of_networks_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@each_case
def test_every_matrix_is_listed_as_prunable_or_free(case: Case) -> None:
    _, params, _ = built(case)
    matrices = {
        name for name, leaf in named_leaves(params).items() if leaf.ndim >= 2 and is_floating(leaf)
    }
    assert case.layers
    assert not case.layers & case.free
    assert case.layers | case.free == matrices


@each_case
def test_the_name_of_a_free_leaf_says_why(case: Case) -> None:
    unexplained = {
        name for name in case.free if not re.search(rf"(^|/)({FREE.pattern})(/value)?$", name)
    }
    assert not unexplained


@each_case
def test_output_is_finite_and_depends_on_every_layer(case: Case) -> None:
    fn, params, x = built(case)
    run = jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})
    leaves, treedef = jax.tree.flatten(params)
    inputs = (x, negated(x))

    def outputs(leaves: list[jax.Array]) -> list[np.ndarray]:
        params = jax.tree.unflatten(treedef, leaves)
        return [np.asarray(y) for x in inputs for y in jax.tree.leaves(run(params, x))]

    reference = outputs(leaves)
    assert all(np.all(np.isfinite(y)) for y in reference)
    noise = np.random.default_rng(2)
    for i, (name, leaf) in enumerate(named_leaves(params).items()):
        if name not in case.layers:
            continue
        moved = np.asarray(leaf) + noise.standard_normal(leaf.shape).astype(leaf.dtype)
        changed = outputs([*leaves[:i], jnp.asarray(moved), *leaves[i + 1 :]])
        largest = max(
            np.max(np.abs(y - y0)) / np.max(np.abs(y0))
            for y, y0 in zip(changed, reference, strict=True)
        )
        assert largest > 1e-4, f"{case.name}: {name} doesn't reach the output"


def test_the_unrolled_and_the_scanned_lstm_are_one_function() -> None:
    (unrolled, params, x), (scanned, _, _) = (
        built(by_name(name)) for name in ("plain/lstm_unrolled", "plain/lstm_scanned")
    )
    np.testing.assert_allclose(
        jax.jit(unrolled)(params, x), jax.jit(scanned)(params, x), rtol=1e-5, atol=1e-6
    )

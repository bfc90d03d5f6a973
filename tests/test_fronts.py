"""The front of paths, nodes and kernels over α."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai

SHAPES = {"1": (6, 24), "2": (24, 24), "3": (24, 5)}
RNG = np.random.default_rng(1)
PARAMS = {name: jnp.asarray(RNG.normal(size=s), jnp.float32) for name, s in SHAPES.items()}
X = jnp.ones((1, 6))


def fn(params, x):
    return jnp.maximum(jnp.maximum(x @ params["1"], 0) @ params["2"], 0) @ params["3"]


def numbers(result):
    return result.topology.log_paths, result.topology.nodes, result.topology.kernels


def test_the_front_is_what_no_single_call_surpasses():
    alphas = (0.0, 0.3, 0.3, 1.0)
    front = dpai.pareto(fn, PARAMS, X, 0.9, alphas=alphas)
    singles = [
        dpai.prune(fn, PARAMS, X, 0.9, method=dpai.DPaI(alpha=a), progress=False) for a in alphas
    ]
    best = []
    for i, single in enumerate(singles):
        mine = numbers(single)
        others = [numbers(o) for j, o in enumerate(singles) if j < i or numbers(o) != mine]
        if not any(all(o >= m for o, m in zip(other, mine, strict=True)) for other in others):
            best.append(mine)
    assert [numbers(result) for result in front] == best
    assert len(best) > 1
    for a, b in itertools.pairwise(front):
        assert a.topology.log_paths > b.topology.log_paths
        assert a.topology.nodes < b.topology.nodes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alphas": ()}, "alphas must be a sequence of numbers"),
        ({"alphas": (0.5, 2.0)}, r"alphas must be in \[0, 1\], got 2.0"),
        ({"method": dpai.SynFlow()}, "method must be a dpai.DPaI"),
    ],
)
def test_wrong_arguments_are_refused(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dpai.pareto(fn, PARAMS, X, 0.9, **given)

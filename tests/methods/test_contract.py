"""What every method owes: the exact count, the same masks for the same key, no NaN, no surprise."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dpai_jax as dpai
from tests.support import problems


def train(params: Any, masks: Any) -> Any:
    """Stands for a user's training: moves each weight a little, differently."""
    return jax.tree.map(lambda p, m: jnp.where(m, p * 1.1 + 0.01, 0), params, masks)


METHODS = {
    "random": dpai.Random(),
    "random, uniform": dpai.Random(dpai.uniform),
    "random, ER": dpai.Random(dpai.er),
    "magnitude": dpai.Magnitude(),
    "magnitude, ERK": dpai.Magnitude(dpai.erk),
    "SNIP": dpai.SNIP(),
    "SNIP, ERK": dpai.SNIP(dpai.erk),
    "iterative SNIP": dpai.IterativeSNIP(3),
    "FORCE": dpai.FORCE(3),
    "GraSP": dpai.GraSP(),
    "SynFlow": dpai.SynFlow(5),
    "SynFlow, ERK": dpai.SynFlow(5, dpai.erk),
    "NTK-SAP": dpai.NTKSAP(3),
    "ProsPr": dpai.ProsPr(2),
    "NPB": dpai.NPB(),
    "PHEW": dpai.PHEW(),
    "IMP": dpai.IMP(train, 0.5),
    "DPaI": dpai.DPaI(steps=3),
    "DPaI, published, global": dpai.DPaI.published(
        steps=3, optimizer=optax.sgd(0.1), allocation=dpai.global_threshold
    ),
}
# Methods whose masks depend on the key.
RANDOM = (
    "PHEW",
    "random",
    "random, uniform",
    "random, ER",
    "NTK-SAP",
    "NPB",
    "DPaI, published, global",
)
# Methods that score by the weights, or by the loss at them.
BY_WEIGHTS = ("SNIP", "iterative SNIP", "FORCE", "GraSP", "SynFlow", "ProsPr")


@functools.cache
def problem(name: str) -> problems.Problem:
    return getattr(problems, name)()


def prune(
    where: problems.Problem, method: Any, sparsity: float = 0.8, seed: int = 0, **arguments: Any
) -> dpai.Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dpai.prune(
            where.fn, where.params, where.x, sparsity, method=method, key=jax.random.key(seed),
            loss_fn=where.loss_fn, batches=where.batches, progress=False, **arguments,
        )  # fmt: skip


def kept(masks: Any) -> int:
    return sum(int(m.sum()) for m in jax.tree.leaves(masks) if m.ndim)


@pytest.mark.parametrize(
    ("where", "sparsity"), [("linen", 0.8), ("flax_nnx", 0.5), ("equinox", 0.0), ("scanned", 0.95)]
)
@pytest.mark.parametrize("name", METHODS)
def test_masks_keep_exactly_the_asked_number_and_have_the_structure_of_params(
    name, where, sparsity
):
    problem_ = problem(where)
    result = prune(problem_, METHODS[name], sparsity)
    assert kept(result.masks) == round((1 - sparsity) * problem_.size)
    for tree in (result.masks, result.scores):
        assert jax.tree.structure(tree) == jax.tree.structure(problem_.params)
    pairs = zip(jax.tree.leaves(problem_.params), jax.tree.leaves(result.masks), strict=True)
    assert all(m.dtype == bool and m.shape in ((), p.shape) for p, m in pairs)
    for score in jax.tree.leaves(result.scores):
        assert not np.any(np.isnan(score))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_key_gives_the_same_masks(name):
    first, again, other = (prune(problem("linen"), METHODS[name], seed=s) for s in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first.masks, again.masks)
    jax.tree.map(np.testing.assert_array_equal, first.scores, again.scores)
    pairs = zip(jax.tree.leaves(first.masks), jax.tree.leaves(other.masks), strict=True)
    assert any(np.any(a != b) for a, b in pairs) == (name in RANDOM)


@pytest.mark.parametrize("name", METHODS)
def test_a_network_of_constants_still_keeps_the_asked_number(name):
    """All saliencies of a layer are equal, or zero: ties, and no NaN."""
    where = problem("flax_nnx")
    for value in (0.0, 0.1):
        params = jax.tree.map(lambda p, value=value: jnp.full_like(p, value), where.params)
        result = prune(where._replace(params=params), METHODS[name])
        assert kept(result.masks) == round(0.2 * where.size)
        assert not any(np.any(np.isnan(score)) for score in jax.tree.leaves(result.scores))


@pytest.mark.parametrize("name", BY_WEIGHTS)
def test_a_head_of_zeros_gives_a_warning_that_names_the_layers(name):
    params = problems.mlp_params()
    params["last"] = jnp.zeros_like(params["last"])
    with pytest.warns(UserWarning, match="all saliencies are 0 in .*last") as caught:
        result = dpai.prune(
            problems.mlp, params, draw_x(), 0.5, method=METHODS[name],
            loss_fn=problems.squared_error, batches=problems.mlp_batches(2), progress=False,
        )  # fmt: skip
    assert kept(result.masks) == round(0.5 * (35 + 42 + 18))
    assert caught[0].filename == __file__


def draw_x() -> jax.Array:
    return jnp.ones((1, 5))


def test_a_layer_that_a_global_threshold_empties_is_reported():
    params = problems.mlp_params()
    params["second"] = params["second"] * 1e-3
    with pytest.warns(UserWarning, match="no path passes .*second.* any more"):
        result = dpai.prune(
            problems.mlp, params, draw_x(), 0.8, method=dpai.Magnitude(), progress=False
        )
    assert [layer.weights for layer in result.topology.layers][1] == 0
    assert "second" in result.topology.collapsed


@pytest.mark.parametrize("name", METHODS)
def test_masks_are_those_of_the_highest_scores(name):
    """Also after steps: removed weights have the lowest scores."""
    result = prune(problem("equinox"), METHODS[name])
    pairs = zip(jax.tree.leaves(result.masks), jax.tree.leaves(result.scores), strict=True)
    layers = [(m, np.abs(s) if "DPaI" in name else s) for m, s in pairs if m.ndim]
    whole = [(np.concatenate([m.ravel() for m, _ in layers]),
              np.concatenate([s.ravel() for _, s in layers]))]  # fmt: skip
    is_global = getattr(METHODS[name], "allocation", None) is dpai.global_threshold
    for mask, score in whole if is_global else layers:
        assert np.min(score[mask]) >= np.max(score[~mask], initial=-np.inf)


@pytest.mark.parametrize("name", ["SNIP", "iterative SNIP", "FORCE", "GraSP", "ProsPr"])
def test_a_method_that_needs_data_says_so(name):
    params = problems.mlp_params()
    with pytest.raises(ValueError, match="loss_fn must be given"):
        dpai.prune(problems.mlp, params, draw_x(), 0.5, method=METHODS[name])
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        dpai.prune(
            problems.mlp,
            params,
            draw_x(),
            0.5,
            method=METHODS[name],
            loss_fn=problems.squared_error,
        )


@pytest.mark.parametrize(
    "name", ["magnitude", "SNIP", "GraSP", "SynFlow", "NTK-SAP", "PHEW", "IMP"]
)
def test_a_method_that_needs_values_refuses_shapes(name):
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), problems.mlp_params())
    with pytest.raises(TypeError, match="params must hold values for this method, but first is"):
        dpai.prune(
            problems.mlp, params, draw_x(), 0.5, method=METHODS[name],
            loss_fn=problems.squared_error, batches=problems.mlp_batches(),
        )  # fmt: skip


@pytest.mark.parametrize("name", ["SNIP", "GraSP", "ProsPr", "FORCE"])
def test_a_loss_that_is_not_finite_is_refused(name):
    batches = [(draw_x() * jnp.inf, jnp.ones((1, 3)))]
    with pytest.raises(ValueError, match="the saliency of a weight of first is NaN"):
        dpai.prune(
            problems.mlp, problems.mlp_params(), draw_x(), 0.5, method=METHODS[name],
            loss_fn=problems.squared_error, batches=batches,
        )  # fmt: skip


def test_what_is_no_loss_is_refused():
    with pytest.raises(TypeError, match=r"loss_fn must be a function loss_fn\(params, batch\)"):
        dpai.prune(
            problems.mlp, problems.mlp_params(), draw_x(), 0.5, method=dpai.SNIP(), loss_fn=3
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dpai.IterativeSNIP(0), "steps must be at least 1, got 0"),
        (lambda: dpai.FORCE(0), "steps must be at least 1, got 0"),
        (lambda: dpai.SynFlow(0), "steps must be at least 1, got 0"),
        (lambda: dpai.NTKSAP(0), "steps must be at least 1, got 0"),
        (lambda: dpai.NTKSAP(epsilon=0.0), "epsilon must be positive, got 0.0"),
        (lambda: dpai.ProsPr(0), "steps must be at least 1, got 0"),
        (lambda: dpai.ProsPr(learning_rate=-1.0), "learning_rate must be positive, got -1.0"),
        (lambda: dpai.IMP(train, 1.0), r"fraction must be in \(0, 1\), got 1.0"),
        (lambda: dpai.DPaI(gamma=0.0), "gamma must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_training_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"train must be a function train\(params, masks\), got 3"):
        dpai.IMP(3)


@pytest.mark.parametrize("where", ["linen", "scanned"])
@pytest.mark.parametrize("name", METHODS)
def test_repair_makes_every_kept_weight_effective_and_keeps_each_layer_s_number(name, where):
    plain = prune(problem(where), METHODS[name], 0.9)
    result = prune(problem(where), METHODS[name], 0.9, repair=True)
    assert result.topology.effective == result.topology.weights
    pairs = zip(plain.topology.layers, result.topology.layers, strict=True)
    assert all(a.weights == b.weights and a.effective <= b.effective for a, b in pairs)
    jax.tree.map(np.testing.assert_array_equal, plain.scores, result.scores)

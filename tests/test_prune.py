"""The one call: what it returns, what it shows, what it refuses, and training what is left."""

import dataclasses
import io
import math
import sys
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import dpai_jax as dpai

SHAPES = {"hidden": (6, 12), "bias": (12,), "out": (12, 4)}
X = jnp.ones((1, 6))
# One of each, so that runs share what is compiled.
SHORT = dpai.DPaI(steps=3)
UNWEIGHED = dpai.DPaI(steps=3, strength="one")
RANDOM = dpai.Random()


def mlp(params, x):
    return jax.nn.relu(x @ params["hidden"] + params["bias"][None]) @ params["out"]


def draw(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal(s), jnp.float32) for name, s in shapes.items()}


PARAMS = draw(SHAPES)


@dataclasses.dataclass(frozen=True)
class Given:
    """A method that knows the masks beforehand."""

    masks: tuple

    def run(self, problem):
        masks = problem.net.leaves(dict(self.masks))
        return dpai.Pruned(masks, [mask.astype(jnp.float32) for mask in masks])


def given(**masks):
    return Given(tuple((name, jnp.asarray(mask, bool)) for name, mask in masks.items()))


def test_the_result_holds_masks_scores_topology_history_and_the_network():
    result = dpai.prune(mlp, PARAMS, X, 0.75, method=SHORT, progress=False)
    assert {field.name for field in dataclasses.fields(result)} == {
        "masks", "scores", "topology", "history", "seconds", "settings", "net",
    }  # fmt: skip
    assert jax.tree.map(jnp.shape, result.masks) == SHAPES | {"bias": ()}
    assert jax.tree.map(jnp.shape, result.scores) == SHAPES | {"bias": ()}
    assert all(mask.dtype == bool for mask in result.masks.values())
    assert result.masks["bias"]
    assert result.scores["bias"] == 0
    assert result.topology == dpai.topology(result.net, result.masks)
    assert result.topology.weights == 30 == sum(int(m.sum()) for m in result.masks.values()) - 1
    assert set(result.history) == {"log_paths", "nodes", "kernels"}
    assert all(len(values) == 3 for values in result.history.values())
    assert 0 < result.seconds < 600
    assert [layer.name for layer in result.net.layers] == ["hidden", "out"]


def test_a_one_shot_method_has_an_empty_history():
    result = dpai.prune(mlp, PARAMS, X, 0.75, method=RANDOM, progress=False)
    assert result.history == {}
    keep = dpai.erk(result.net, 0.75)
    jax.tree.map(np.testing.assert_array_equal, result.masks, dpai.binarize(result.scores, keep))


def test_an_allocation_of_ones_own_is_followed():
    method = dpai.Random(allocation=dpai.uniform)
    result = dpai.prune(mlp, PARAMS, X, 0.75, method=method, progress=False)
    assert [layer.weights for layer in result.topology.layers] == [18, 12]


@pytest.mark.parametrize("method", [UNWEIGHED, RANDOM], ids=["DPaI", "Random"])
def test_shapes_stand_for_parameters_and_input(method):
    abstract = jax.eval_shape(lambda: (PARAMS, X))
    key = jax.random.key(5)
    from_shapes = dpai.prune(mlp, *abstract, 0.75, method=method, key=key, progress=False)
    from_arrays = dpai.prune(mlp, PARAMS, X, 0.75, method=method, key=key, progress=False)
    jax.tree.map(np.testing.assert_array_equal, from_shapes.masks, from_arrays.masks)


@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_values_of_parameters_and_input_do_not_matter_where_paths_count_one(value):
    strange = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), (PARAMS, X))
    result = dpai.prune(mlp, *strange, 0.75, method=UNWEIGHED, progress=False)
    expected = dpai.prune(mlp, PARAMS, X, 0.75, method=UNWEIGHED, progress=False)
    jax.tree.map(np.testing.assert_array_equal, result.masks, expected.masks)


def test_the_default_key_is_always_the_same():
    default, zero, one = (
        dpai.prune(mlp, PARAMS, X, 0.75, method=RANDOM, key=key, progress=False)
        for key in (None, jax.random.key(0), jax.random.key(1))
    )
    jax.tree.map(np.testing.assert_array_equal, default.masks, zero.masks)
    assert np.any(default.masks["hidden"] != one.masks["hidden"])


def test_prunable_narrows_what_is_pruned():
    def only_out(name, leaf):
        return name == "out" and leaf.shape == (12, 4)

    result = dpai.prune(mlp, PARAMS, X, 0.75, method=RANDOM, prunable=only_out, progress=False)
    assert [layer.name for layer in result.net.layers] == ["out"]
    assert result.masks["hidden"].shape == ()
    assert result.topology.weights == int(result.masks["out"].sum()) == 12


def test_layer_collapse_is_a_warning_that_names_the_layers():
    def branches(params, x):
        return jax.nn.relu(x @ params["first"]) @ params["second"] + x @ params["third"]

    params = draw({"first": (2, 3), "second": (3, 2), "third": (2, 2)})
    method = given(
        first=[[1, 0, 0], [1, 0, 0]], second=[[0, 0], [1, 1], [1, 0]], third=[[1, 0], [0, 1]]
    )
    message = r"no path passes first, second any more \(layer collapse\); paths past them remain"
    with pytest.warns(UserWarning, match=message):
        result = dpai.prune(
            branches, params, jnp.ones((1, 2)), 9 / 16, method=method, progress=False
        )
    assert result.topology.collapsed == ("first", "second")
    assert result.topology.effective == 2
    assert result.topology.log_paths == pytest.approx(math.log(2), abs=1e-5)


def test_a_collapse_of_all_layers_is_said_and_few_are_named():
    def chain(params, x):
        for name in "abcdef":
            x = x @ params[name]
        return x

    params = draw(dict.fromkeys("abcdef", (2, 2)))
    method = given(a=np.zeros((2, 2)), **dict.fromkeys("bcdef", np.ones((2, 2))))
    message = r"no path passes a, b, c, 3 more any more \(layer collapse\); no path remains"
    with pytest.warns(UserWarning, match=message):
        dpai.prune(chain, params, jnp.ones((1, 2)), 4 / 24, method=method, progress=False)


def test_a_network_without_collapse_gives_no_warning():
    method = given(hidden=np.eye(6, 12), bias=True, out=np.eye(12, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = dpai.prune(mlp, PARAMS, X, 1 - 10 / 120, method=method, progress=False)
    assert result.topology.nodes == 8


def test_a_network_that_lost_every_path_is_still_reported():
    method = given(hidden=np.eye(6, 12), bias=True, out=np.eye(12, 4, k=-8))
    with pytest.warns(UserWarning, match="hidden, out"):
        result = dpai.prune(mlp, PARAMS, X, 1 - 10 / 120, method=method, progress=False)
    assert result.topology.log_paths == -math.inf
    assert result.topology.weights == 10
    assert result.topology.nodes == result.topology.effective == 0


def test_a_method_that_keeps_another_number_is_an_error():
    method = given(hidden=np.eye(6, 12), bias=True, out=np.eye(12, 4))
    with pytest.raises(RuntimeError, match="Given kept 10 weights where 60 were asked for"):
        dpai.prune(mlp, PARAMS, X, 0.5, method=method, progress=False)


@pytest.mark.parametrize("sparsity", [-0.5, 1.0, 2, float("nan")])
def test_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match=rf"sparsity must .*\[0, 1\), got {sparsity}"):
        dpai.prune(mlp, PARAMS, X, sparsity)


def test_fewer_weights_than_layers_are_refused():
    with pytest.raises(ValueError, match=r"keeps 1 of 120 weights, fewer than .* layers \(2\)"):
        dpai.prune(mlp, PARAMS, X, 1 - 1 / 120)


@pytest.mark.parametrize("method", ["dpai", 3, dpai.erk, object()])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(TypeError, match="method must be a pruning method"):
        dpai.prune(mlp, PARAMS, X, 0.5, method=method)


@pytest.mark.filterwarnings("error")
def test_a_score_that_is_not_a_number_is_refused():
    @dataclasses.dataclass(frozen=True)
    class Broken:
        def run(self, problem):
            scores = [jnp.full((6, 12), jnp.nan), jnp.ones((12, 4))]
            return dpai.Pruned(problem.select(scores, problem.keep(dpai.erk)), scores)

    with pytest.raises(ValueError, match=r"scores .* hidden has a NaN"):
        dpai.prune(mlp, PARAMS, X, 0.5, method=Broken())


def test_a_network_without_any_path_is_refused():
    def cut(params, x):
        return jnp.pad(x @ params["w"], ((0, 0), (0, 4)))[:, -4:]

    with pytest.raises(ValueError, match="no path"):
        dpai.prune(cut, draw({"w": (6, 4)}), X, 0.5)


def test_an_output_that_ignores_the_input_is_refused():
    with pytest.raises(ValueError, match=r"(?i)prunable|depend"):
        dpai.prune(lambda params, _: params["w"] @ jnp.ones((4, 2)), draw({"w": (6, 4)}), X, 0.5)


def test_a_function_that_is_none_is_refused():
    with pytest.raises(TypeError, match="fn must be a function"):
        dpai.prune(PARAMS, mlp, X, 0.5)


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self):
        return True


def test_progress_is_one_line_that_ends_with_a_summary(capsys):
    result = dpai.prune(mlp, PARAMS, X, 0.75, method=SHORT, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    assert "step 3/3" in captured.err
    summary = captured.err.rsplit("\r", 1)[1]
    topology = result.topology
    for part in ("DPaI", "30 of 120 weights", f"nodes {topology.nodes}", f"{topology.kernels}"):
        assert part in summary
    assert f"{topology.log_paths:.2f}" in summary


@pytest.mark.parametrize("method", [SHORT, RANDOM], ids=["DPaI", "Random"])
def test_nothing_is_written_unless_asked_for_where_there_is_no_terminal(capsys, method):
    dpai.prune(mlp, PARAMS, X, 0.75, method=method)
    dpai.prune(mlp, PARAMS, X, 0.75, method=method, progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal_unless_declined(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    dpai.prune(mlp, PARAMS, X, 0.75, method=RANDOM, progress=False)
    assert terminal.getvalue() == ""
    dpai.prune(mlp, PARAMS, X, 0.75, method=RANDOM)
    assert "Random" in terminal.getvalue()


INPUTS = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
LABELS = np.argmax(INPUTS @ np.random.default_rng(1).standard_normal((6, 3)), axis=1)


def cross_entropy(logits):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(LABELS))
    return losses.mean()


@pytest.fixture
def library_may_promote():
    """Optax's Adam mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def assert_pruned_weights_are_zero(params, masks):
    pruned = 0
    for leaf, mask in zip(jax.tree.leaves(params), jax.tree.leaves(masks), strict=True):
        if jnp.ndim(mask):
            assert np.all(np.asarray(leaf)[~np.asarray(mask)] == 0)
            assert np.any(np.asarray(leaf)[np.asarray(mask)] != 0)
            pruned += int(np.sum(~np.asarray(mask)))
    return pruned


def trained(loss, params, masks, steps=40):
    """The losses along a training of the masked parameters, and the parameters in the end."""
    tx = dpai.keep_pruned(optax.adamw(0.05, weight_decay=0.01), masks)
    params = dpai.apply_masks(params, masks)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    losses, state = [], tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return losses, params


class Classifier(nnx.Module):
    def __init__(self, make_norm, rngs):
        self.hidden = nnx.Linear(6, 16, rngs=rngs)
        self.norm = make_norm(16, rngs=rngs)
        self.out = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.norm(self.hidden(x))))


@pytest.mark.usefixtures("library_may_promote")
def test_an_nnx_model_trains_with_the_same_calls():
    graphdef, params = nnx.split(Classifier(nnx.LayerNorm, nnx.Rngs(0)))

    def fn(params, x):
        return nnx.merge(graphdef, params)(x)

    result = dpai.prune(fn, params, INPUTS[:1], 0.7, method=SHORT, progress=False)
    assert result.topology.weights == round(0.3 * (6 * 16 + 16 * 3))
    losses, params = trained(lambda p: cross_entropy(fn(p, INPUTS)), params, result.masks)
    assert losses[-1] < 0.7 * losses[0]
    assert assert_pruned_weights_are_zero(params, result.masks) == 144 - 43


@pytest.mark.usefixtures("library_may_promote")
def test_an_equinox_model_trains_with_the_same_calls():
    model = eqx.nn.MLP(6, 3, 16, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    result = dpai.prune(fn, params, INPUTS[:1], 0.7, method=SHORT, progress=False)
    losses, params = trained(lambda p: cross_entropy(fn(p, INPUTS)), params, result.masks)
    assert losses[-1] < 0.7 * losses[0]
    assert assert_pruned_weights_are_zero(params, result.masks) == 144 - 43

"""Bad input gets one sentence that names the argument; each line below is one bad input."""

import copy
import pickle
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import dpai_jax as dpai

# As users run it.
pytestmark = pytest.mark.standard_promotion

KEY = jax.random.key(0)


def fn(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def loss(params, batch):
    return jnp.mean(fn(params, batch) ** 2)


PARAMS = {"a": jax.random.normal(KEY, (16, 32)), "b": jax.random.normal(KEY, (32, 4))}
X = jnp.ones((1, 16))
NET = dpai.trace(fn, PARAMS, X)
MASKS = {"a": jnp.ones((16, 32), bool), "b": jnp.ones((32, 4), bool)}
FLOATS = {"a": jnp.ones((16, 32)), "b": jnp.ones((32, 4))}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x)


def prune(**arguments):
    call = {"fn": fn, "params": PARAMS, "x": X, "sparsity": 0.5, "key": KEY, "progress": False}
    return dpai.prune(**call | arguments)


def snip(**arguments):
    return prune(**{"method": dpai.SNIP(), "loss_fn": loss, "batches": [X]} | arguments)


def ascend(**settings):
    return dpai.ascent(NET, settings.pop("scores", FLOATS), settings.pop("keep", 9), **settings)


SETTINGS = (
    {"alpha": 2},
    {"alpha": "0.9"},
    {"alpha": jnp.ones(2)},
    {"beta": -1},
    {"steps": 0},
    {"steps": 2.5},
    {"gamma": 0},
    {"counting": "x"},
    {"strength": "weights"},
    {"schedule": "x"},
    {"balance": "x"},
    {"optimizer": "adam"},
    {"optimizer": optax.adam},
    {"allocation": "erk"},
    {"scores": {"a": 1}},
    {"allocation": lambda net, s: {"a": 100_000, "b": 3}},
    {"allocation": lambda net, s: {"a": 0.5, "b": 0.5}},
    {"allocation": lambda net, s: {"a": 3, "b": 3}},
)


def scaled(factor):
    return jax.tree.map(lambda m: m * factor, FLOATS)


def integers(tree):
    return jax.tree.map(lambda leaf: leaf.astype(int), tree)


BAD = {
    **{
        f"sparsity {value!r}": ("sparsity", lambda value=value: prune(sparsity=value))
        for value in (1, -0.1, 1.5, float("nan"), "0.9", None, True)
    },
    "sparsity array": ("sparsity", lambda: prune(sparsity=jnp.ones(3))),
    "sparsity too high": ("sparsity", lambda: prune(sparsity=0.9999)),
    "NaN params": ("params", lambda: prune(params=PARAMS | {"a": PARAMS["a"] * jnp.nan})),
    "integer params": ("params", lambda: prune(params=integers(PARAMS))),
    "string leaf": ("params", lambda: prune(params=PARAMS | {"c": "x"})),
    "constant fn": ("fn", lambda: prune(fn=lambda p, x: jnp.ones(3))),
    "fn of params": ("fn", lambda: prune(fn=lambda p, x: p["a"] @ p["b"])),
    "fn of one argument": ("fn", lambda: prune(fn=lambda p: 1)),
    "fn without result": ("fn", lambda: prune(fn=lambda p, x: None)),
    "Linen module": ("fn", lambda: prune(fn=Net())),
    "NNX module": ("fn", lambda: prune(fn=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))),
    "swapped": ("fn", lambda: dpai.prune(PARAMS, fn, X, 0.5)),
    "string x": ("x", lambda: prune(x="a")),
    "part of the masks": ("masks", lambda: dpai.topology(NET, {"a": MASKS["a"]})),
    "masks swapped": ("masks", lambda: dpai.topology(NET, {"a": MASKS["b"], "b": MASKS["a"]})),
    "masks of .5": ("masks", lambda: dpai.topology(NET, scaled(0.5))),
    "masks of NaN": ("masks", lambda: dpai.topology(NET, scaled(jnp.nan))),
    "params for masks": ("masks", lambda: dpai.topology(NET, PARAMS)),
    "params for masks, effective": ("masks", lambda: dpai.effective_weights(NET, PARAMS)),
    "params for masks, repair": ("masks", lambda: dpai.repair(NET, PARAMS)),
    "params for masks, shuffled": ("masks", lambda: dpai.shuffled(PARAMS, KEY)),
    "a Result for masks": ("masks", lambda: dpai.topology(NET, prune())),
    "negative masks": ("masks", lambda: dpai.log_paths(NET, scaled(-1.0))),
    "net is a function": ("net", lambda: dpai.topology(fn, MASKS)),
    "net is params": ("net", lambda: dpai.erk(PARAMS, 0.5)),
    "integer masks": ("masks", lambda: dpai.apply_masks(PARAMS, integers(MASKS))),
    "no masks": ("masks", lambda: dpai.apply_masks(PARAMS, None)),
    "masks of variables": ("masks", lambda: dpai.apply_masks(PARAMS, {"params": MASKS})),
    "float masks": ("masks", lambda: dpai.keep_pruned(optax.sgd(1.0), FLOATS)),
    "a Result to keep": ("masks", lambda: dpai.keep_pruned(optax.sgd(1.0), prune())),
    "optimizer's name": ("optimizer", lambda: dpai.keep_pruned("adam", MASKS)),
    "optimizer not called": ("optimizer", lambda: dpai.keep_pruned(optax.adam, MASKS)),
    "no params": ("params", lambda: dpai.keep_pruned(optax.sgd(1.0), MASKS).update(PARAMS, ())),
    **{
        f"{name} without loss": ("loss_fn", lambda name=name: prune(method=getattr(dpai, name)()))
        for name in ("SNIP", "GraSP", "FORCE", "IterativeSNIP", "ProsPr")
    },
    "no batch": ("batches", lambda: snip(batches=[])),
    "array for batches": ("batches", lambda: snip(batches=jnp.ones((3, 16)))),
    "one batch for batches": ("batches", lambda: snip(batches=(X, jnp.zeros(1, int)))),
    "loss is a number": ("loss_fn", lambda: snip(loss_fn=3)),
    "loss of an array": ("loss_fn", lambda: snip(loss_fn=fn)),
    "loss of one argument": ("loss_fn", lambda: snip(loss_fn=lambda p: 1.0)),
    "loss is NaN": ("loss_fn", lambda: snip(loss_fn=lambda p, b: loss(p, b) * jnp.nan)),
    "integer key": ("key", lambda: prune(key=0)),
    "keys": ("key", lambda: prune(key=jax.random.split(KEY, 2))),
    "key of repair": ("key", lambda: dpai.repair(NET, MASKS, None, 3)),
    "class": ("method", lambda: prune(method=dpai.SNIP)),
    "method's name": ("method", lambda: prune(method="snip")),
    "prunable of one argument": ("prunable", lambda: prune(prunable=lambda name: True)),
    "prunable's name": ("prunable", lambda: prune(prunable="a")),
    "nothing prunable": ("prunable", lambda: prune(prunable=lambda name, leaf: False)),
    "gates": ("gates", lambda: prune(gates="x")),
    "progress": ("progress", lambda: prune(progress="yes")),
    "repair": ("repair", lambda: prune(repair="no")),
    "under jit": ("params", lambda: jax.jit(lambda p: prune(params=p).masks)(PARAMS)),
    **{
        f"DPaI {i}, {next(iter(settings))}": (
            next(iter(settings)),
            lambda settings=settings: prune(method=dpai.DPaI(**settings)),
        )
        for i, settings in enumerate(SETTINGS)
    },
    "alpha of ascent": ("alpha", lambda: ascend(alpha=2)),
    "gamma of ascent": ("gamma", lambda: ascend(gamma=-1)),
    "keep of ascent": ("keep", lambda: ascend(keep=10**6)),
    "scores of ascent": ("scores", lambda: ascend(scores=scaled(jnp.nan))),
    "fractions to keep": ("keep", lambda: dpai.binarize(PARAMS, {"a": 0.5, "b": 0.5})),
    "a fraction to keep": ("keep", lambda: dpai.binarize(PARAMS, 0.2)),
    "True to keep": ("keep", lambda: dpai.binarize(PARAMS, True)),
    "too many to keep": ("keep", lambda: dpai.binarize(PARAMS, 10**6)),
    "fewer than none to keep": ("keep", lambda: dpai.binarize(PARAMS, -1)),
    "SNIP's allocation": ("allocation", lambda: dpai.SNIP(allocation="global")),
    "IMP's train": ("train", lambda: dpai.IMP(None)),
    "what IMP's train returns": ("train", lambda: prune(method=dpai.IMP(lambda p, m: (p, m)))),
    "diverging scores": (
        "optimizer",
        lambda: prune(method=dpai.DPaI(optimizer=optax.sgd(jnp.nan))),
    ),
    "no NNX module": ("model", lambda: dpai.from_nnx(fn)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence_that_names_the_argument(name):
    argument, call = BAD[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    text = str(raised.value)
    assert argument in text
    assert "\n" not in text
    assert len(text) < 300
    assert "dpai_jax" in traceback.extract_tb(raised.value.__traceback__)[-1].filename


def test_what_fn_raises_stays_and_says_what_it_was_called_with():
    with pytest.raises(TypeError, match="dot_general") as raised:
        prune(x=jnp.ones((1, 7)))
    assert any("float32[1, 7]" in note for note in raised.value.__notes__)


def test_trees_of_another_structure_are_told_by_the_first_leaf_that_differs():
    params = {f"layer_{i:02}": jnp.ones((4, 4)) for i in range(60)}
    masks = jax.tree.map(lambda w: w > 0, params)
    del masks["layer_31"]
    with pytest.raises(ValueError, match="layer_31") as raised:
        dpai.apply_masks(params, masks)
    assert len(str(raised.value)) < 300
    with pytest.raises(ValueError, match='pass its "params" alone'):
        dpai.apply_masks(params, {"params": params})


def test_a_loss_without_a_hash_is_as_good_as_any():
    class Loss:
        __hash__ = None

        def __call__(self, params, batch):
            return loss(params, batch)

    masks = snip(loss_fn=Loss()).masks
    jax.tree.map(np.testing.assert_array_equal, masks, snip().masks)


def test_an_endless_iterator_is_read_where_data_is_used_and_only_so_far():
    read = []

    def endless():
        while True:
            read.append(1)
            yield X

    assert snip(batches=endless()).topology.weights == 320
    assert len(read) == 128
    with pytest.warns(UserWarning, match="Magnitude uses no data"):
        prune(method=dpai.Magnitude(), batches=endless())
    assert len(read) == 128


def test_results_are_pickled_copied_and_shown_briefly():
    result = prune()
    again = pickle.loads(pickle.dumps(result))
    assert again.net is None
    jax.tree.map(np.testing.assert_array_equal, again.masks, result.masks)
    assert copy.deepcopy(result).net is result.net
    assert len(repr(result)) < 200
    with pytest.raises(TypeError, match=r"call dpai_jax\.trace again"):
        pickle.dumps(NET)

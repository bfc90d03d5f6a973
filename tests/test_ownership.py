"""What is compiled, when, and for how long: networks, rules and settings that were made anew."""

import gc
import importlib
import pkgutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive

import dpai_jax as dpai
from dpai_jax.paths.interpreter import _RULES
from dpai_jax.tools import host, meshes
from dpai_jax.tools.signatures import signature

PARAMS = {"hidden": jnp.ones((8, 12)), "out": jnp.ones((12, 4))}
X = jnp.ones((1, 8))


def network():
    return lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]


def test_a_rule_registered_later_holds_for_networks_traced_from_then_on():
    primitive = Primitive("scale_of_a_test")
    primitive.def_abstract_eval(lambda x: x)

    def fn(params, x):
        return primitive.bind(x @ params["hidden"]) @ params["out"]

    def paths():
        return round(float(jnp.exp(dpai.log_paths(dpai.trace(fn, PARAMS, X), PARAMS))))

    dpai.register_rule(primitive)(lambda interpreter, eqn, x: x)
    assert paths() == 8 * 12 * 4
    dpai.register_rule(primitive)(
        lambda interpreter, eqn, x: interpreter.flow(
            x.spread._replace(array=x.mantissa * 2), x.exponent
        )
    )
    assert paths() == 2 * 8 * 12 * 4


def test_a_network_and_what_it_holds_go_when_nine_others_were_traced():
    fn = network()
    result = dpai.prune(fn, PARAMS, X, 0.5, progress=False)
    held = [weakref.ref(result.net), weakref.ref(fn)]
    del fn, result
    for width in range(13, 22):
        params = {"hidden": jnp.ones((8, width)), "out": jnp.ones((width, 4))}
        dpai.trace(network(), params, X)
    gc.collect()
    assert [reference() for reference in held] == [None, None]


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adam(0.05),
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: optax.chain(optax.clip(1.0), optax.adamw(1e-3)),
        lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 30)),
        network,
    ],
)
def test_functions_made_anew_with_the_same_values_are_alike(make):
    assert signature(make()) == signature(make())
    assert hash(signature(make())) == hash(signature(make()))


def test_functions_of_other_values_or_arrays_are_not_alike():
    assert signature(optax.adam(0.05)) != signature(optax.adam(0.06))
    assert signature(optax.adam(1)) != signature(optax.adam(1.0))
    array, equal = jnp.ones(3), jnp.ones(3)
    functions = [lambda a=a: a for a in (array, array, equal)]
    assert signature(functions[0]) == signature(functions[1]) != signature(functions[2])


@pytest.mark.parametrize("optimizer", [lambda: None, lambda: optax.sgd(0.5)])
def test_another_setting_that_a_step_does_not_use_compiles_nothing(optimizer):
    fn = network()
    scores = jax.tree.map(jnp.ones_like, PARAMS)

    def method(**settings):
        usual = {"steps": 2, "optimizer": optimizer(), "allocation": dpai.erk}
        return dpai.DPaI(**usual | settings)

    first = dpai.prune(fn, PARAMS, X, 0.5, method=method(), progress=False)
    compiled = set(first.net.programs)
    for settings in (
        {"steps": 3},
        {"beta": 0.75},
        {"allocation": lambda net, sparsity: dpai.erk(net, sparsity)},
        {"scores": scores},
        {"alpha": 0.3},
        {"beta": 0.9},
    ):
        dpai.prune(fn, PARAMS, X, 0.6, method=method(**settings), progress=False)
    assert set(first.net.programs) == compiled


def test_a_function_of_the_same_program_made_anew_is_the_same_network():
    assert dpai.trace(network(), PARAMS, X) is dpai.trace(network(), PARAMS, X)
    # What a call computes beside its result, such as a derivative, is no part of it.
    rounded = jax.custom_jvp(lambda x: jnp.round(x))
    rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))

    def fn(which):
        return lambda params, x: which(x @ params["hidden"]) @ params["out"]

    assert dpai.trace(fn(rounded), PARAMS, X) is dpai.trace(fn(rounded), PARAMS, X)
    others = [fn(jnp.round), fn(jnp.tanh), lambda p, x: fn(rounded)(p, x * 2), fn(lambda h: h + 1)]
    networks = [dpai.trace(other, PARAMS, X) for other in (*others, network())]
    assert len(set(map(id, networks))) == 5


@pytest.mark.parametrize("present", [[1, 1, 0], [1, 0, 1]])
def test_programs_that_differ_in_a_constant_alone_are_two_networks(present):
    mask = np.asarray(present, np.float32)[:, None]

    def fn(params, x):
        return jax.nn.relu(x @ (params["a"] * mask)) @ params["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    net = dpai.trace(fn, params, jnp.ones((1, 3)))
    kept = dpai.effective_weights(net, jax.tree.map(lambda x: jnp.ones(x.shape, bool), params))
    np.testing.assert_array_equal(kept["a"], np.broadcast_to(mask > 0, (3, 4)))


def test_a_failure_ends_what_is_compiled_ahead(monkeypatch):
    """Else a process that fails would go on compiling before it ends."""
    waiting, running = threading.Event(), threading.Event()

    def compile_slowly():
        running.set()
        waiting.wait(30)

    one = ThreadPoolExecutor(1)
    monkeypatch.setattr(meshes, "_COMPILERS", one)
    one.submit(compile_slowly)
    running.wait(30)
    params = {"hidden": jnp.ones((8, 5)), "out": jnp.full((5, 4), jnp.nan)}

    class Failing:
        def compile_ahead(self, problem):
            dpai.DPaI().compile_ahead(problem)
            raise KeyboardInterrupt

        def run(self, _):
            raise AssertionError

    with pytest.raises(KeyboardInterrupt), host.compiled_only():
        dpai.prune(network(), params, X, 0.5, method=Failing(), progress=False)
    waiting.set()
    net = dpai.trace(network(), params, X)
    under_way = [f for p in net.programs.values() for f in getattr(p, "_ahead", {}).values()]
    assert under_way
    assert all(future.cancelled() for future in under_way)
    # What was given up is compiled where it is called.
    good = params | {"out": jnp.ones((5, 4))}
    assert dpai.prune(network(), good, X, 0.5, progress=False).topology.weights == 30
    one.shutdown()


def test_names_and_gates_belong_to_a_network():
    def fn(params, x):
        return x @ params[0] @ params[1]

    params = [jnp.ones((8, 3)), jnp.ones((3, 2))]
    first = dpai.trace(fn, params, X)
    assert dpai.trace(fn, params, X, gates="signal") is not first
    assert len(dpai.trace(fn, params, X, prunable=lambda name, leaf: name == "1").layers) == 1
    assert len(first.layers) == 2
    named = dpai.trace(lambda p, x: fn([p["a"], p["b"]], x), {"a": params[0], "b": params[1]}, X)
    assert [layer.name for layer in named.layers] == ["a", "b"]


def test_no_module_is_shadowed_by_a_function():
    for module in pkgutil.iter_modules(dpai.__path__):
        importlib.import_module(f"dpai_jax.{module.name}")
        assert not callable(getattr(dpai, module.name)), module.name


def test_noise_is_the_same_whatever_the_configuration_of_threefry():
    masks = []
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            result = dpai.prune(network(), PARAMS, X, 0.5, method=dpai.Random(), progress=False)
            masks.append(result.masks)
    jax.tree.map(np.testing.assert_array_equal, *masks)


def test_a_class_token_steers_the_output_through_keys_that_no_other_path_needs():
    """One attention read at its learned token: the keys' kernel has paths, as it has in truth."""

    def vit(params, x):
        tokens = jnp.concatenate([params["token"][None, None], x], 1)
        queries, keys, values = (tokens @ params[name] for name in ("q", "k", "v"))
        return (jax.nn.softmax(queries @ keys.mT) @ values)[:, 0]

    draw = np.random.default_rng(0).standard_normal
    params = {name: jnp.asarray(draw((4, 4)), jnp.float32) for name in "qkv"}
    params["token"] = jnp.asarray(draw(4), jnp.float32)
    x = jnp.asarray(draw((1, 3, 4)), jnp.float32)
    jacobian = jax.jacobian(lambda x, key: vit(params | {"k": key}, x))
    assert np.any(jacobian(x, params["k"]) != jacobian(x, params["k"] * 0))
    topology = dpai.prune(vit, params, x, 0.0, method=dpai.Random(), progress=False).topology
    effective = {layer.name: layer.effective for layer in topology.layers}
    # Queries of the token alone are read, and it is the same for every x.
    assert effective["k"] == effective["v"] == 16


def test_weights_that_nobody_reads_get_no_budget():
    def half_read(params, x):
        return (x @ params["wide"])[:, :6] @ params["out"]

    params = {"wide": jnp.ones((8, 12)), "out": jnp.ones((6, 4))}
    for method in (dpai.DPaI(steps=3), dpai.Magnitude(), dpai.Random(), dpai.Magnitude(dpai.erk)):
        result = dpai.prune(half_read, params, X, 0.5, method=method, progress=False)
        assert not np.any(result.masks["wide"][:, 6:])
        assert result.topology.weights == 60
    keep = dpai.uniform(result.net, 0.5)
    assert keep == {"wide": 40, "out": 20}  # of 48 and 24 that can be effective


def test_every_name_of_a_rule_is_of_a_primitive():
    """By JAX's own list; some exist on one of the supported releases only."""
    from jax import lax
    from jax.extend.core import primitives

    known = {
        item.name
        for module in (primitives, lax)
        for item in vars(module).values()
        if isinstance(item, Primitive)
    }
    of_other_releases = {
        "call", "checkpoint", "closed_call", "custom_lin", "eq_to", "le_to", "lt_to", "log2",
        "one_minus_square", "polynomial", "pvary", "reshard", "sharding_constraint", "device_put",
        "copy_p", "name", "unstack", "stack", "tile", "optimization_barrier", "mulhi", "remat2",
        "custom_jvp_call", "custom_vjp_call", "jit", "eval_jaxpr", "shard_map",
        "ragged_dot_general",
    }  # fmt: skip
    added = {name for name in _RULES if name.startswith(("my_", "scale_of", "a_test"))}
    assert set(_RULES) - known - of_other_releases - added == set()

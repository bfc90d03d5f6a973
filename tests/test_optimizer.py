"""Pruned weights stay exactly zero, whatever optimizer trains the others; normalised ascent."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import dpai_jax as dpai

RNG = np.random.default_rng(0)
MASKS = {
    "hidden": {"kernel": jnp.asarray(RNG.random((6, 8)) < 0.4), "bias": jnp.asarray(True)},
    "out": {"kernel": jnp.asarray(RNG.random((8, 3)) < 0.4)},
}
# Not zero at pruned weights, as they come from an initialiser.
PARAMS = jax.tree.map(
    lambda shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32),
    {"hidden": {"kernel": (6, 8), "bias": (8,)}, "out": {"kernel": (8, 3)}},
    is_leaf=lambda node: isinstance(node, tuple),
)
X, Y = RNG.standard_normal((2, 16, 6)).astype(np.float32)
KERNELS = (("hidden", "kernel"), ("out", "kernel"))


def loss(params):
    hidden = jnp.tanh(X @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return jnp.mean((hidden @ params["out"]["kernel"] - Y[:, :3]) ** 2)


# What optax's transformations have to be told; one that needs anything else is not in the contract.
ARGUMENTS = {
    "adv_optimizer": optax.sgd(0.05),
    "base_optimizer": optax.adam(0.1),
    "clipping": 0.01,
    "decay": 0.9,
    "eta": 0.01,
    "f": lambda updates, _: updates,
    "freeze_mask": {"hidden": False, "out": True},
    "gamma": 0.5,
    "inner": optax.adam(0.1),
    "learning_rate": 0.1,
    "mask": {"hidden": True, "out": False},
    "max_backtracking_steps": 3,
    "max_consecutive_errors": 3,
    "max_delta": 1.0,
    "max_linesearch_steps": 3,
    "max_norm": 1.0,
    "measure": lambda updates, **_: updates,
    "measure_name": "name",
    "optimizer": optax.adam(0.1),
    "param_labels": {"hidden": "first", "out": "second"},
    "should_transform_fn": lambda step: step % 2 == 0,
    "step_size": -0.1,
    "step_size_fn": lambda count: -0.1 / (1 + count),
    "threshold": 1.0,
    "transforms": {"first": optax.adam(0.1), "second": optax.sgd(0.1, momentum=0.9)},
    "tx": optax.adam(0.1),
}
# Set though they have a default: decay must not bring weights back, nor a rank of 128 fill a small
# kernel's projection up to the kernel's own shape. Noise needs a seed.
OVERRIDES = {"weight_decay": 0.1, "weight_decay_rate": 0.1, "rank": 2, "key": jax.random.key(0)}
NOT_IN_THE_CONTRACT = {
    "chain": "has no argument by name; below",
    "differentially_private_aggregate": "takes a gradient for each example",
    "dpsgd": "takes a gradient for each example",
    "lookahead": "takes pairs of parameters; below",
    "optimistic_adam": "is deprecated",
    "scale_by_muon": "takes matrices alone; within muon",
    "scale_by_zoom_linesearch": "takes long to compile; within lbfgs",
    "stateless_with_tree_map": "calls its function leaf by leaf; as stateless",
}
# Arguments of `update` beyond gradients, state and parameters.
NEEDS = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "polyak_sgd": ("value",),
    "reduce_on_plateau": ("value",),
    "scale_by_backtracking_linesearch": ("value", "grad", "value_fn"),
    "scale_by_polyak": ("value",),
    "sophia": ("obj_fn",),
}


def transformations(module):
    """The gradient transformations of a module that can be made with the arguments above."""
    kinds = (optax.GradientTransformation, optax.GradientTransformationExtraArgs)
    found = {}
    for name, factory in sorted(vars(module).items()):
        if not inspect.isfunction(factory) or name in NOT_IN_THE_CONTRACT:
            continue
        signature = inspect.signature(factory)
        if signature.return_annotation not in kinds:
            continue
        arguments = {
            key: OVERRIDES.get(key, ARGUMENTS.get(key))
            for key, parameter in signature.parameters.items()
            if parameter.kind is not parameter.VAR_POSITIONAL
            and (key in OVERRIDES or parameter.default is parameter.empty)
        }
        if None not in arguments.values():
            found[name] = functools.partial(factory, **arguments)
    return found


def compositions():
    """Optimizers that are not one function of optax."""
    adam = optax.adam(0.1)
    decay = optax.add_decayed_weights(0.1)
    hyperparameters = optax.inject_hyperparams(optax.adamw)
    free = optax.contrib.schedule_free(optax.adamw(0.1, weight_decay=0.1), 0.1)
    return {
        "sgd with decay": lambda: optax.chain(decay, optax.sgd(0.1)),
        "sgd with decay and Nesterov momentum": lambda: optax.chain(
            decay, optax.sgd(0.1, momentum=0.9, nesterov=True)
        ),
        "decay after sgd": lambda: optax.chain(optax.sgd(0.1), optax.add_decayed_weights(-0.01)),
        "clipped adam": lambda: optax.chain(optax.clip_by_global_norm(1.0), adam),
        "adam, clipped after": lambda: optax.chain(adam, optax.clip_by_block_rms(0.1)),
        "adam on a schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10)),
        "adam with bfloat16 moments": lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16),
        "adafactor with momentum": lambda: optax.adafactor(
            0.1, momentum=0.9, weight_decay_rate=0.1, dtype_momentum=jnp.float32
        ),
        "factored adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=1),
        "centred rmsprop": lambda: optax.rmsprop(0.1, centered=True, momentum=0.9, nesterov=True),
        "schedule-free adamw": lambda: free,
        "MultiSteps": lambda: optax.MultiSteps(adam, 2),
        "MultiSteps as a transformation": lambda: optax.MultiSteps(
            optax.lion(0.1, weight_decay=0.1), 2
        ).gradient_transformation(),
        "injected hyperparameters": lambda: hyperparameters(learning_rate=0.1, weight_decay=0.1),
        "ema of the updates": lambda: optax.chain(adam, optax.ema(0.9)),
        "adam in several wrappers": lambda: optax.apply_if_finite(
            optax.chain(optax.clip(1.0), optax.masked(adam, {"hidden": True, "out": False})), 3
        ),
    }


CONTRACT = transformations(optax) | transformations(optax.contrib) | compositions()


def parallel_leaves(state):
    """The leaves of a state that have a kernel's name and shape, with its mask."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [getattr(key, "key", None) for key in path]
        for at in KERNELS:
            mask = MASKS[at[0]][at[1]]
            if tuple(keys[-2:]) == at and leaf.shape == mask.shape:
                yield jax.tree_util.keystr(path), np.asarray(leaf), np.asarray(mask)


def assert_zero_where_pruned(tree):
    found = list(parallel_leaves(tree))
    for name, leaf, mask in found:
        assert np.all(leaf[~mask] == 0), f"{name} is not zero where pruned"
    return len(found)


def train(optimizer, needs=(), steps=3, poison=0.0, params=PARAMS, loss=loss):
    """The parameters and states along a training whose gradients of pruned weights are `poison`."""
    fast_compilation = {"xla_backend_optimization_level": 0}

    @functools.partial(jax.jit, compiler_options=fast_compilation)
    def step(params, state, poison):
        value, gradients = jax.value_and_grad(loss)(params)
        gradients = jax.tree.map(lambda g, m: jnp.where(m, g, poison), gradients, MASKS)
        extra = {"value": value, "grad": gradients, "value_fn": loss, "obj_fn": loss}
        extra = {name: extra[name] for name in needs}
        updates, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    trajectory = [(params, optimizer.init(params))]
    for _ in range(steps):
        trajectory.append(step(*trajectory[-1], jnp.float32(poison)))
    return trajectory


def shapes_and_dtypes(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


@pytest.fixture(autouse=True)
def optax_may_promote():
    """Most of optax's optimizers mix dtypes, and one mixes ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", CONTRACT)
def test_contract_of_every_optimizer(name):
    optimizer = dpai.keep_pruned(CONTRACT[name](), MASKS)
    trajectory = train(optimizer, NEEDS.get(name, ()), poison=np.nan)
    start = shapes_and_dtypes(trajectory[0])
    for params, state in trajectory[1:]:
        assert shapes_and_dtypes((params, state)) == start
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
        assert assert_zero_where_pruned(params) == 2
        assert_zero_where_pruned(state)


def test_the_contract_covers_the_optimizers_that_are_asked_for():
    names = {"adamw", "lion", "lamb", "muon", "adafactor", "schedule_free", "noisy_sgd", "galore"}
    assert names <= CONTRACT.keys()
    assert len(transformations(optax)) > 60
    assert len(transformations(optax.contrib)) > 25


@pytest.mark.parametrize(
    "name", ["sgd with decay and Nesterov momentum", "adamw", "lion", "muon", "clipped adam"]
)
def test_gradients_of_pruned_weights_have_no_effect(name):
    optimizer = dpai.keep_pruned(CONTRACT[name](), MASKS)
    clean, poisoned = (train(optimizer, poison=poison)[-1] for poison in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), clean[0], PARAMS)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["adam", "lamb", "schedule-free adamw", "prodigy"])
def test_moments_are_held_at_zero_and_not_merely_left_out_of_the_test(name):
    state = train(dpai.keep_pruned(CONTRACT[name](), MASKS))[-1][1]
    assert assert_zero_where_pruned(state) >= 4
    kept = [np.all(leaf[mask] != 0) for _, leaf, mask in parallel_leaves(state)]
    assert all(kept)


@pytest.mark.parametrize(
    "optimizer",
    [
        # Factored for the larger kernel, whole for the smaller.
        optax.adafactor(0.1, min_dim_size_to_factor=6),
        optax.masked(
            optax.adabelief(0.1),
            {"hidden": {"kernel": True, "bias": False}, "out": {"kernel": True}},
        ),
    ],
    ids=["partly factored", "masked"],
)
def test_moments_are_zero_where_the_state_holds_only_some_of_the_parameters(optimizer):
    for _, state in train(dpai.keep_pruned(optimizer, MASKS))[1:]:
        assert assert_zero_where_pruned(state) >= 1


@pytest.mark.parametrize("name", ["adagrad", "rprop"])
def test_accumulators_are_zero_where_pruned_from_the_start(name):
    state = dpai.keep_pruned(CONTRACT[name](), MASKS).init(PARAMS)
    assert assert_zero_where_pruned(state) >= 2


@pytest.mark.parametrize("name", ["lamb", "lars", "fromage", "adafactor"])
def test_values_that_pruned_weights_start_from_have_no_effect(name):
    # These scale their updates by the norm of the parameters.
    optimizer = dpai.keep_pruned(CONTRACT[name](), MASKS)

    def trained(junk):
        params = jax.tree.map(lambda p, m: jnp.where(m, p, junk), PARAMS, MASKS)
        return train(optimizer, params=params, loss=lambda p: loss(dpai.apply_masks(p, MASKS)))[-1]

    jax.tree.map(np.testing.assert_array_equal, trained(0.0), trained(100.0))


def test_float32_weights_are_zero_after_one_bfloat16_update():
    gradients = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = dpai.keep_pruned(optax.sgd(0.1), MASKS)
    updates, _ = tx.update(gradients, tx.init(PARAMS), PARAMS)
    params = optax.apply_updates(PARAMS, updates)
    assert assert_zero_where_pruned(params) == 2
    assert shapes_and_dtypes(params) == shapes_and_dtypes(PARAMS)


def masked_sgd(momentum, nesterov, weight_decay, rate, steps):
    """Masked linear regression by stochastic gradient descent, in float64 and by hand."""
    mask = np.asarray(MASKS["hidden"]["kernel"])
    weights = np.where(mask, np.asarray(PARAMS["hidden"]["kernel"], np.float64), 0)
    bias = np.asarray(PARAMS["hidden"]["bias"], np.float64)
    velocity, bias_velocity = np.zeros_like(weights), np.zeros_like(bias)
    for _ in range(steps):
        error = 2 * (X.astype(np.float64) @ weights + bias - 1) / (16 * 8)
        gradient = np.where(mask, X.T.astype(np.float64) @ error, 0) + weight_decay * weights
        bias_gradient = error.sum(0) + weight_decay * bias
        velocity = momentum * velocity + gradient
        bias_velocity = momentum * bias_velocity + bias_gradient
        if nesterov:
            weights = weights - rate * (gradient + momentum * velocity)
            bias = bias - rate * (bias_gradient + momentum * bias_velocity)
        else:
            weights = weights - rate * velocity
            bias = bias - rate * bias_velocity
        yield weights, bias, velocity


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_training_is_that_of_a_masked_network_by_hand(momentum, nesterov):
    masks = MASKS["hidden"]
    sgd = optax.sgd(0.1, momentum=momentum, nesterov=nesterov)
    tx = dpai.keep_pruned(optax.chain(optax.add_decayed_weights(0.05), sgd), masks)
    params = dpai.apply_masks(PARAMS["hidden"], masks)
    state = tx.init(params)

    def regression(p):
        return jnp.mean((X @ p["kernel"] + p["bias"][None] - 1) ** 2)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(regression)(params), state, params)
        return optax.apply_updates(params, updates), state

    for weights, bias, velocity in masked_sgd(momentum, nesterov, 0.05, 0.1, 6):
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            params, state = step(params, state)
        np.testing.assert_allclose(params["kernel"], weights, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(params["bias"], bias, rtol=2e-5, atol=1e-6)
        trace = optax.tree.get(state, "trace")["kernel"]
        np.testing.assert_allclose(trace, velocity, rtol=2e-5, atol=1e-6)
        assert np.all(np.asarray(params["kernel"])[weights == 0] == 0)


def test_masks_may_be_arguments_of_a_jitted_step():
    @jax.jit
    def step(params, state, masks):
        tx = dpai.keep_pruned(optax.adamw(0.1, weight_decay=0.1), masks)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    tx = dpai.keep_pruned(optax.adamw(0.1, weight_decay=0.1), MASKS)
    expected = train(tx, steps=3)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state, MASKS)
        assert_zero_where_pruned((params, state))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        (params, state),
        expected[-1],
    )


@pytest.mark.parametrize("name", ["sgd with decay", "adamw", "adafactor"])
def test_bfloat16_parameters_stay_bfloat16(name):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = dpai.keep_pruned(CONTRACT[name](), MASKS)
    for trained, state in train(tx, params=params)[1:]:
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(trained))
        assert_zero_where_pruned((trained, state))


def test_multi_steps_around_it_holds_pruned_weights_at_zero():
    tx = optax.MultiSteps(dpai.keep_pruned(optax.adamw(0.1, weight_decay=0.1), MASKS), 2)
    params = dpai.apply_masks(PARAMS, MASKS)
    trajectory = train(tx, steps=4, params=params)
    assert all(assert_zero_where_pruned(params) for params, _ in trajectory)
    jax.tree.map(np.testing.assert_array_equal, trajectory[0][0], trajectory[1][0])
    assert np.any(trajectory[1][0]["out"]["kernel"] != trajectory[2][0]["out"]["kernel"])


def test_lookahead_around_it_holds_both_parameters_at_zero():
    tx = optax.lookahead(dpai.keep_pruned(optax.adamw(0.1), MASKS), 2, 0.5)
    params = optax.LookaheadParams.init_synced(dpai.apply_masks(PARAMS, MASKS))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params.fast), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(4):
        params, state = step(params, state)
        assert assert_zero_where_pruned(params) == 4


def test_moving_averages_of_the_parameters_are_zero_where_pruned():
    tx = dpai.keep_pruned(optax.adamw(0.1, weight_decay=0.1), MASKS)
    trajectory = train(tx, steps=3, params=dpai.apply_masks(PARAMS, MASKS))
    average = trajectory[0][0]
    for params, _ in trajectory[1:]:
        average = optax.incremental_update(params, average, 0.1)
        assert assert_zero_where_pruned(average) == 2


def test_the_averaged_parameters_of_schedule_free_are_zero_where_pruned():
    tx = dpai.keep_pruned(CONTRACT["schedule-free adamw"](), MASKS)
    for params, state in train(tx, steps=3)[1:]:
        averaged = optax.contrib.schedule_free_eval_params(state, params)
        assert assert_zero_where_pruned(averaged) == 2


def test_an_update_without_parameters_is_refused():
    tx = dpai.keep_pruned(optax.sgd(0.1, momentum=0.9), MASKS)
    with pytest.raises(ValueError, match="params must be given to update"):
        tx.update(PARAMS, tx.init(PARAMS))


def test_the_state_is_that_of_the_inner_optimizer():
    inner = optax.adamw(0.1)
    state = dpai.keep_pruned(inner, MASKS).init(PARAMS)
    assert shapes_and_dtypes(state) == shapes_and_dtypes(inner.init(PARAMS))


def test_masks_of_another_structure_are_refused():
    tx = dpai.keep_pruned(optax.adam(0.1), MASKS["hidden"])
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match="masks must have the tree structure of params"):
        tx.update(PARAMS, optax.adam(0.1).init(PARAMS), PARAMS)


def test_masks_of_another_shape_or_dtype_are_refused():
    masks = {"kernel": jnp.ones((8, 6), bool), "bias": jnp.asarray(True)}
    with pytest.raises(ValueError, match=r"shape \(6, 8\) at kernel, got \(8, 6\)"):
        dpai.keep_pruned(optax.adam(0.1), masks).init(PARAMS["hidden"])
    masks = {"kernel": jnp.ones((6, 8)), "bias": jnp.asarray(True)}
    with pytest.raises(TypeError, match="boolean, but kernel is float32"):
        dpai.keep_pruned(optax.adam(0.1), masks).init(PARAMS["hidden"])

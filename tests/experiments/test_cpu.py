"""The convolution of the networks against that of `lax`, and what XLA makes of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dpai_jax as dpai
from experiments import cpu, models, steps
from tests.support import abstract

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("size", "stride", "padding", "groups"),
    [
        (1, 1, "SAME", 1),
        (1, 2, "VALID", 1),
        (3, 1, "SAME", 1),
        (3, 2, "SAME", 4),
        (3, 1, "VALID", 2),
        (7, 2, "SAME", 1),
    ],
)
def test_a_convolution_and_its_derivatives_are_those_of_lax(size, stride, padding, groups, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 9, 8, 4)), dtype)
    kernel = jnp.asarray(rng.normal(size=(size, size, 4 // groups, 8)), dtype)

    def derivatives(convolution):
        def fn(x, kernel):
            return convolution(
                x,
                kernel,
                (stride, stride),
                padding,
                dimension_numbers=DIMENSIONS,
                feature_group_count=groups,
            )

        y, pullback = jax.vjp(fn, x, kernel)
        return y, pullback(jnp.cos(y)), jax.jvp(fn, (x, kernel), (jnp.sin(x), kernel))

    options = cpu.compiler_options()
    found = jax.jit(lambda: derivatives(cpu.convolve), compiler_options=options)()
    expected = jax.jit(lambda: derivatives(lax.conv_general_dilated))()
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        # Float32 sums of up to 216 terms, in whichever order, may differ by a rounding for each;
        # those of bfloat16 are taken in float32 and rounded once or twice.
        roundings = 216 if dtype == jnp.float32 else 16
        scale = float(jnp.abs(other).max())
        np.testing.assert_allclose(
            np.asarray(one, np.float64),
            np.asarray(other, np.float64),
            rtol=0,
            atol=roundings * float(jnp.finfo(dtype).eps) * scale,
        )


def test_paths_and_layers_are_those_of_lax(monkeypatch):
    x = abstract.images(1, 8, 8, 3)

    def counted():
        model = models.ResNet(7, width=2, depth=8)
        variables = abstract.variables(model, x)
        # Not a bound method: its trace would be shared.
        net = dpai.trace(lambda variables, x: model.apply(variables, x), variables, x)
        masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), variables)
        return net.layers, dpai.log_paths(net, masks)

    layers, paths = counted()
    monkeypatch.setattr(lax, "optimization_barrier", lambda x: x)
    plain_layers, plain_paths = counted()
    assert layers == plain_layers
    assert float(paths) == float(plain_paths)


@pytest.mark.standard_promotion
def test_a_step_works_out_no_residual_sum_anew_for_a_kernel():
    if jax.default_backend() != "cpu":
        pytest.skip("barriers are for CPUs")
    model = models.ResNet(7, width=16, depth=20)
    x = jnp.zeros((4, 8, 8, 3))
    variables = steps.initialize(model, 0, x.shape[1:])
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), variables["params"])
    optimizer = steps.Optimizer(0.1, 0.9, 0.0, 0, 2)
    state = steps.start(optimizer, variables, masks)
    labels = jnp.zeros(4, jnp.int32)
    step = steps._jitted(steps._step)
    program = step.lower(model, optimizer, state, x, labels).compile().as_text()
    bodies = re.split(r"\n}\n", program)
    transposing = [body for body in bodies if " transpose(" in body and "ENTRY" not in body]
    assert transposing
    assert all(body.count(" maximum(") <= 1 for body in transposing)


@pytest.mark.parametrize(
    ("cores", "devices", "eigen"), [(2, 1, True), (1, 1, False), (2, 2, False)]
)
def test_a_lone_device_of_several_cores_convolves_by_the_library_that_uses_them(
    monkeypatch, cores, devices, eigen
):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    monkeypatch.setattr(cpu, "cores", lambda: cores)
    assert ("xla_cpu_experimental_ynn_fusion_type" in cpu.compiler_options()) == eigen

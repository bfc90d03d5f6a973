"""What holds of every network. The published sizes of each family are held in models/."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import models
from experiments.config import Config, ConfigError
from tests.support import abstract

NETWORKS = {
    "mlp": (models.MLP(7, width=6), abstract.images(2, 4, 4, 1)),
    "lenet": (models.LeNet(7, width=6), abstract.images(2, 4, 4, 1)),
    "lenet5": (models.LeNet5(7, width=3), abstract.images(2, 12, 12, 1)),
    "resnet": (models.ResNet(7, width=2, depth=8), abstract.images(2, 8, 8, 3)),
    "se_resnet": (models.ResNet(7, width=2, depth=8, reduction=1), abstract.images(2, 8, 8, 3)),
    "resnet_basic": (models.ImageNetResNet(7, width=2), abstract.images(2, 8, 8, 3)),
    "resnet_bottleneck": (
        models.ImageNetResNet(7, width=2, depth=50, stem="imagenet"),
        abstract.images(2, 32, 32, 3),
    ),
    "vgg": (models.VGG(7, width=2, depth=11), abstract.images(2, 16, 16, 3)),
    "efficientnet": (models.EfficientNet(7, width=8, depth=0.25), abstract.images(2, 32, 32, 3)),
    "vit": (models.ViT(7, width=6, depth=2, heads=3, patch=4), abstract.images(2, 8, 8, 3)),
    "gpt2": (models.GPT2(7, width=6, depth=2, heads=3, context=5), abstract.tokens(2, 5)),
}
every_network = pytest.mark.parametrize(("model", "x"), NETWORKS.values(), ids=NETWORKS)


@every_network
def test_logits_are_one_for_each_class(model, x):
    logits = jax.eval_shape(model.apply, abstract.variables(model, x), x)
    assert logits.shape == ((2, 5, 7) if isinstance(model, models.GPT2) else (2, 7))
    assert logits.dtype == jnp.float32


# Flax's norms promote to float32 themselves.
@pytest.mark.standard_promotion
@every_network
def test_it_computes_in_the_given_dtype_with_float32_parameters(model, x):
    model = model.clone(dtype=jnp.bfloat16)
    outputs = abstract.outputs(model, x)
    assert {name for name, output in outputs.items() if output.dtype != jnp.bfloat16} == set()
    variables = jax.tree.leaves(abstract.variables(model, x))
    assert {leaf.dtype for leaf in variables} == {jnp.dtype(jnp.float32)}


@every_network
def test_the_library_finds_every_kernel(model, x):
    expected = {f"params/{name}" for name in abstract.kernels(model, x)}
    if isinstance(model, models.GPT2):
        expected.add("params/embed/embedding")
    assert {layer.name for layer in abstract.trace(model, x).layers} == expected


@every_network
def test_the_layer_of_the_logits_does_not_start_at_zero(model, x):
    name = "embed/embedding" if isinstance(model, models.GPT2) else "head/kernel"
    (weights,) = abstract.initial(model, x, name)
    assert np.all(weights != 0)


@pytest.mark.parametrize(
    ("name", "conv", "momentum"),
    [
        ("resnet", "stem", 0.9),
        ("resnet_bottleneck", "stem", 0.9),
        ("vgg", "stage1_conv1", 0.9),
        ("efficientnet", "stem", 0.99),
    ],
)
def test_only_training_updates_the_batch_statistics(name, conv, momentum):
    model, x = NETWORKS[name]
    images = jax.random.normal(jax.random.key(0), x.shape)
    norm = {"stem": "stem_norm", "stage1_conv1": "stage1_norm1"}[conv]

    @jax.jit
    def first_norm():
        """Its input, and its mean before, after evaluation and after training."""
        variables = model.init(jax.random.key(1, impl="rbg"), images)
        everything = {"capture_intermediates": True, "mutable": ["batch_stats", "intermediates"]}
        evaluated = model.apply(variables, images, **everything)[1]
        trained = model.apply(variables, images, train=True, **everything)[1]
        convolved = evaluated["intermediates"][conv]["__call__"][0]
        states = (variables, evaluated, trained)
        return convolved, [state["batch_stats"][norm]["mean"] for state in states]

    convolved, (before, evaluated, trained) = first_norm()
    np.testing.assert_array_equal(before, 0)
    np.testing.assert_array_equal(evaluated, before)
    expected = (1 - momentum) * np.mean(convolved, axis=(0, 1, 2))
    np.testing.assert_allclose(trained, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_name_makes_a_network_of_any_width(name):
    x = abstract.tokens(1, 6) if name == "gpt2" else abstract.images(1, 32, 32, 1)
    model = models.create(name, 3, 12)
    assert abstract.shapes(model, x)
    assert model.width == 12 != models.create(name, 3).width


def test_the_same_arguments_make_the_same_module():
    assert models.create("vgg16", 10, 4) is models.create("vgg16", 10, 4)


def test_a_configuration_has_the_published_width_unless_it_names_one():
    assert models.create("resnet20", 10, Config().width).width == 16
    assert models.create("resnet18", 10, Config().width).width == 64
    assert models.create("resnet18", 10, Config(width=8).width).width == 8


def test_an_unknown_model_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model must be one of \[.*'resnet20'.*\]; got 'resnet'"):
        models.create("resnet", 10)

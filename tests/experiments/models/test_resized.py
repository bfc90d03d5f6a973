import jax
import jax.numpy as jnp
import numpy as np

from experiments import models
from tests.support import abstract


def test_vit_b16_takes_the_images_of_tiny_imagenet_at_224_pixels():
    model = models.create("vit_b16", 200, image_size=224)
    small, large = (abstract.images(1, side, side, 3) for side in (64, 224))
    assert abstract.shapes(model, small) == abstract.shapes(model, large)
    assert abstract.shapes(model, large)["positions"] == (1, 197, 768)
    net = abstract.trace(model, large)
    assert [layer.name for layer in net.layers] == [
        layer.name for layer in abstract.trace(models.create("vit_b16", 200), large).layers
    ]


def test_the_networks_of_32_pixels_take_the_images_of_tiny_imagenet_as_they_are():
    for name in ("resnet18", "resnet20", "vgg19", "efficientnet_b0", "lenet5", "mlp"):
        logits = abstract.outputs(models.create(name, 200), abstract.images(2, 64, 64, 3))[""]
        assert logits.shape == (2, 200)


def test_images_are_interpolated_between_the_centres_of_pixels():
    """Held against np.interp along each axis."""
    plain, resized = models.MLP(3, width=4), models.create("mlp", 3, 4, image_size=6)
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 1))

    def along(y, axis):
        centres = (np.arange(6) + 0.5) * y.shape[axis] / 6 - 0.5
        one = lambda row: np.interp(centres, np.arange(len(row)), row)  # noqa: E731
        return np.apply_along_axis(one, axis, y)

    large = along(along(np.asarray(x), 1), 2).astype(np.float32)
    variables = resized.init(jax.random.key(1, impl="rbg"), jnp.zeros((1, 6, 6, 1)))
    expected = plain.apply(variables, large)
    np.testing.assert_allclose(resized.apply(variables, x), expected, rtol=1e-4, atol=1e-5)

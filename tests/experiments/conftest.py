"""What the tests of the experiments share."""

import flax.linen as nn
import pytest

from experiments import datasets, models


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory):
    """Prepared data sets go to a folder of this run, never to the user's cache."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def digits(data_dir):
    return datasets.load("digits", data_dir)


class Tiny(nn.Module):
    """Two convolutions and a head: all that a network has, and compiled in seconds."""

    num_classes: int
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        for index in range(2):
            x = nn.Conv(self.width * 2**index, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


@pytest.fixture(scope="session", autouse=True)
def tiny_model():
    """Gives the small network a name for configurations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", Tiny)
        yield

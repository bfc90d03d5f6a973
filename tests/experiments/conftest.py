"""What the tests of the experiments share."""

import importlib.util
from typing import Any

import flax.linen as nn
import pytest

import experiments.__main__
from experiments import datasets, devices, models
from tests.support.meshes import mesh_of

# `make bench` tests the peer, with the PyTorch that it measures beside.
collect_ignore = [] if importlib.util.find_spec("torch") else ["test_peer.py"]


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory):
    """Prepared data sets go to a folder of this run, never to the user's cache."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def nothing_is_kept():
    """Commands that are called in this process leave JAX's cache as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.__main__, "keep_compiled", lambda: None)
        yield


@pytest.fixture(scope="session")
def digits(data_dir):
    return datasets.load("digits", data_dir)


@pytest.fixture(scope="session", autouse=True)
def one_device():
    """Trains on one device of the simulated ones, unless a test asks for more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "data_mesh", lambda: mesh_of(1))
        yield


class Tiny(nn.Module):
    """Two convolutions and a head: all that a network has, and compiled in seconds."""

    num_classes: int
    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        for index in range(2):
            features = self.width * 2**index
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False, dtype=self.dtype)(x)
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=self.dtype)
            x = nn.relu(norm(x))
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.reshape(len(x), -1))


@pytest.fixture(scope="session", autouse=True)
def tiny_model():
    """Gives the small network a name for configurations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "tiny", Tiny)
        yield

"""The masks that each method gave when they were recorded, bit by bit, on one and eight devices."""

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.support import recorded

FILE = Path(__file__).parent / "support" / "recorded_masks.npz"


@pytest.fixture(scope="module")
def masks():
    with np.load(FILE) as archive:
        return dict(archive)


@pytest.mark.standard_promotion
@pytest.mark.parametrize("method", recorded.METHODS)
@pytest.mark.parametrize(
    "network",
    ["mlp", "residual", pytest.param("transformer", marks=pytest.mark.optimized)],
)
@pytest.mark.filterwarnings("ignore:no path passes")
def test_masks_are_those_recorded(network, method, masks):
    if (network, method) == ("transformer", "ntksap") and jax.__version_info__ >= (0, 11):
        pytest.skip("NTK-SAP compares nearly equal outputs, which later releases round otherwise")
    for sparsity in recorded.SPARSITIES:
        found = recorded.masks_of(network, method, sparsity, devices=1)
        np.testing.assert_array_equal(found, masks[f"{network}/{method}/{sparsity}"])
    on_eight = recorded.masks_of(network, method, sparsity, devices=8)
    np.testing.assert_array_equal(on_eight, masks[f"{network}/{method}/{sparsity}"])

"""The masks that each method gave when they were recorded, bit by bit, on one and eight devices."""

from pathlib import Path

import numpy as np
import pytest

from tests.support import recorded

# NTK-SAP compares nearly equal outputs, which other processors and releases round otherwise.
CASES = [
    pytest.param(network, method, marks=[pytest.mark.optimized] * (network == "transformer"))
    for network in recorded.NETWORKS
    for method in recorded.METHODS
    if (network, method) != ("transformer", "ntksap")
]

# On eight devices every method prunes the MLP. Those whose programs follow the network itself, not
# its gradients alone, prune the others too.
ON_EIGHT = ("dpai", "dpai erk", "dpai exact", "dpai repaired", "npb", "synflow")

FILE = Path(__file__).parent / "support" / "recorded_masks.npz"


@pytest.fixture(scope="module")
def masks():
    with np.load(FILE) as archive:
        return dict(archive)


@pytest.mark.standard_promotion
@pytest.mark.parametrize(("network", "method"), CASES)
@pytest.mark.filterwarnings("ignore:no path passes")
def test_masks_are_those_recorded(network, method, masks):
    for sparsity in recorded.SPARSITIES:
        found = recorded.masks_of(network, method, sparsity, devices=1)
        np.testing.assert_array_equal(found, masks[f"{network}/{method}/{sparsity}"])
    if network == "mlp" or method in ON_EIGHT:
        on_eight = recorded.masks_of(network, method, sparsity, devices=8)
        np.testing.assert_array_equal(on_eight, masks[f"{network}/{method}/{sparsity}"])

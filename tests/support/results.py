"""Results of pruning, compared."""

from collections.abc import Sequence

import jax
import numpy as np

import dpai_jax as dpai


def assert_same(many: Sequence[dpai.Result], singles: Sequence[dpai.Result]) -> None:
    """Compares what was found, bit by bit."""
    for one, single in zip(many, singles, strict=True):
        for part in ("masks", "scores", "history"):
            jax.tree.map(np.testing.assert_array_equal, getattr(one, part), getattr(single, part))
        assert one.topology == single.topology

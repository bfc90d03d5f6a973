"""What a picture is drawn of."""

from __future__ import annotations

from typing import Any

from dpai_jax.paths import Network
from dpai_jax.pruning import Result
from dpai_jax.tools.trees import shown

PyTree = Any


def network_and_masks(source: Any, masks: PyTree | None) -> tuple[Network, PyTree]:
    """The network and the masks of a result, or a network and masks given beside it.

    Raises:
      TypeError: if `source` is neither.
      ValueError: if the network or the masks are missing.
    """
    if isinstance(source, Result):
        if source.net is None:
            raise ValueError(
                "source must have its network, but a loaded result has none: pass the network that"
                " dpai_jax.trace returns, and masks=result.masks"
            )
        return source.net, source.masks if masks is None else masks
    if not isinstance(source, Network):
        raise TypeError(f"source must be a Result or a Network, got {shown(source)}")
    if masks is None:
        raise ValueError("masks must be given where source is a Network")
    return source, masks

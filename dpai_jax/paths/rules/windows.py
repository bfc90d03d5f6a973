"""Windows that slide along an axis: how often their taps are inside it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def coverage(
    size: int,
    taps: int,
    outputs: int,
    stride: int,
    padding: Sequence[int],
    base_dilation: int,
    window_dilation: int,
) -> np.ndarray:
    """The fraction of a window's positions at which each of its taps is on an entry.

    Args:
      size: entries along the axis.
      taps: taps of the window.
      outputs: positions of the window.
      stride: entries from one position to the next.
      padding: zeros before the first entry, and after the last one.
      base_dilation: steps from one entry to the next; there are zeros in between.
      window_dilation: steps from one tap to the next.

    Returns:
      float32 array (taps,).
    """
    starts = np.arange(outputs)[:, None] * stride - padding[0]
    places = starts + np.arange(taps) * window_dilation
    inside = (places >= 0) & (places <= (size - 1) * base_dilation) & (places % base_dilation == 0)
    return inside.mean(0).astype(np.float32) if outputs else np.zeros(taps, np.float32)

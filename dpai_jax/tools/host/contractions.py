"""Products of matrices and convolutions in NumPy, as products of matrices by BLAS."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpai_jax.tools.host.plan import Run, UnknownError, Value, rule

Avals = Sequence[Any]
Params = Mapping[str, Any]


@rule("dot_general")
def _dot(ins: Avals, outs: Avals, params: Params) -> Run:
    contracted, batch = params["dimension_numbers"]
    if any(aval.dtype != np.float32 for aval in ins):
        raise UnknownError("a product of matrices of integers")
    others = [
        [i for i in range(len(aval.shape)) if i not in (*contracted[side], *batch[side])]
        for side, aval in enumerate(ins)
    ]
    n_batch, n_terms = (math.prod(ins[0].shape[i] for i in axes[0]) for axes in (batch, contracted))
    orders = ((*batch[0], *others[0], *contracted[0]), (*batch[1], *contracted[1], *others[1]))

    # A single term is not added to zero, which has another sign than a product may have.
    product = np.multiply if n_terms == 1 else np.matmul

    def run(x: Value, y: Value) -> Value:
        a = np.transpose(x, orders[0]).reshape(n_batch, -1, n_terms)
        b = np.transpose(y, orders[1]).reshape(n_batch, n_terms, -1)
        return product(a, b).reshape(outs[0].shape)[()]

    return run


@rule("conv_general_dilated")
def _conv(ins: Avals, _outs: Avals, params: Params) -> Run:
    if params["batch_group_count"] != 1 or any(aval.dtype != np.float32 for aval in ins):
        raise UnknownError("a convolution in groups of the batch, or of integers")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    batch, _, *sizes = (ins[0].shape[i] for i in numbers.lhs_spec)
    n_out, n_in, *taps = (ins[1].shape[i] for i in numbers.rhs_spec)
    apart = params["rhs_dilation"]
    spans = tuple((n - 1) * d + 1 for n, d in zip(taps, apart, strict=True))
    into = _Room(sizes, params["lhs_dilation"], params["padding"])
    steps = tuple(slice(None, None, n) for n in (*params["window_strides"], *apart))
    axes = tuple(range(2, 2 + len(taps)))
    order = np.argsort(numbers.out_spec)

    def run(x: Value, kernel: Value) -> Value:
        padded = into.put(np.transpose(x, numbers.lhs_spec))
        windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axes)
        windows = windows[(slice(None), slice(None), *steps)]
        places = windows.shape[2 : 2 + len(taps)]
        windows = windows.reshape(batch, groups, n_in, math.prod(places), math.prod(taps))
        rows = windows.transpose(1, 0, 3, 2, 4).reshape(groups, -1, n_in * math.prod(taps))
        columns = np.transpose(kernel, numbers.rhs_spec).reshape(groups, n_out // groups, -1)
        found = np.matmul(rows, columns.swapaxes(1, 2))
        found = found.reshape(groups, batch, -1, n_out // groups).transpose(1, 0, 3, 2)
        return np.transpose(found.reshape(batch, n_out, *places), order)

    return run


class _Room:
    """Where maps lie in larger ones: padded or cut at the ends, and apart.

    Args:
      sizes: of the maps.
      apart: how far apart their entries are.
      padding: how many zeros are before and behind; negative where entries are cut off.
    """

    def __init__(
        self, sizes: Sequence[int], apart: Sequence[int], padding: Sequence[tuple[int, int]]
    ):
        self._shape, own, into = [], [slice(None)] * 2, [slice(None)] * 2
        for n, step, (low, high) in zip(sizes, apart, padding, strict=True):
            size = low + (n - 1) * step + 1 + high
            first = max(-(low // step), 0)
            end = min((size - 1 - low) // step + 1, n)
            own.append(slice(first, end))
            into.append(slice(low + first * step, low + (end - 1) * step + 1, step))
            self._shape.append(size)
        self._own, self._into = tuple(own), tuple(into)

    def put(self, maps: Value) -> Value:
        """Arrays (batch, features, *sizes) in their room."""
        whole = np.zeros((*maps.shape[:2], *self._shape), maps.dtype)
        whole[self._into] = maps[self._own]
        return whole

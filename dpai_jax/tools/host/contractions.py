"""Products of matrices and convolutions in NumPy, as products of matrices by BLAS."""

from __future__ import annotations

import math

import numpy as np

from dpai_jax.tools.host.plan import Avals, Params, Run, UnknownError, Value, noted, rule
from dpai_jax.tools.host.rules import padded


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

    return noted(run, rounds=n_terms > 1)


@rule("conv_general_dilated")
def _conv(ins: Avals, _outs: Avals, params: Params) -> Run:
    if params["batch_group_count"] != 1 or any(aval.dtype != np.float32 for aval in ins):
        raise UnknownError("a convolution in groups of the batch, or of integers")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    batch, _, *_ = sizes = [ins[0].shape[i] for i in numbers.lhs_spec]
    n_out, n_in, *taps = (ins[1].shape[i] for i in numbers.rhs_spec)
    apart = params["rhs_dilation"]
    spans = tuple((n - 1) * d + 1 for n, d in zip(taps, apart, strict=True))
    pads = zip(params["padding"], params["lhs_dilation"], strict=True)
    config = [(0, 0, 0)] * 2 + [(low, high, step - 1) for (low, high), step in pads]
    pad = padded(sizes, config)
    steps = tuple(slice(None, None, n) for n in (*params["window_strides"], *apart))
    axes = tuple(range(2, 2 + len(taps)))
    order = np.argsort(numbers.out_spec)

    # The kernel's axes before that of its outputs, and after; and what they are in the windows.
    out, *others = numbers.rhs_spec
    before, after = range(out), range(out + 1, len(ins[1].shape))
    n_before, n_after = (math.prod(ins[1].shape[i] for i in own) for own in (before, after))
    in_windows = dict(zip(others, (1, *range(-len(taps), 0)), strict=True))
    order_of_rows = [0, *axes, *(in_windows[i] for i in (*before, *after))]

    def of_one_group(windows: Value, kernel: Value) -> Value:
        """Does not copy a kernel that lies well in memory."""
        rows = windows.transpose(order_of_rows)
        if n_before > n_after:
            rows = rows.reshape(batch, -1, n_before * n_after)
            found = rows @ np.moveaxis(kernel, out, -1).reshape(-1, n_out)
        else:
            rows = rows.reshape(batch, -1, n_before, n_after).swapaxes(1, 2)
            columns = kernel.reshape(n_before, n_out, n_after).swapaxes(1, 2)
            found = (rows @ columns).sum(1)
        return found.swapaxes(1, 2)

    def of_groups(windows: Value, kernel: Value) -> Value:
        windows = windows.reshape(batch, groups, n_in, -1, math.prod(taps))
        rows = windows.transpose(1, 0, 3, 2, 4).reshape(groups, -1, n_in * math.prod(taps))
        columns = np.transpose(kernel, numbers.rhs_spec).reshape(groups, n_out // groups, -1)
        found = np.matmul(rows, columns.swapaxes(1, 2))
        return found.reshape(groups, batch, -1, n_out // groups).transpose(1, 0, 3, 2)

    product = of_one_group if groups == 1 else of_groups

    def run(x: Value, kernel: Value) -> Value:
        whole = pad(np.transpose(x, numbers.lhs_spec), 0)
        windows = np.lib.stride_tricks.sliding_window_view(whole, spans, axes)
        windows = windows[(slice(None), slice(None), *steps)]
        places = windows.shape[2 : 2 + len(taps)]
        return np.transpose(product(windows, kernel).reshape(batch, n_out, *places), order)

    return noted(run, rounds=n_in * math.prod(taps) > 1)

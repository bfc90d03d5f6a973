"""Convolutions of counts, in ways that XLA computes well."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dpai_jax.tools.sums import totals

# XLA on CPUs calls a library for convolutions of more features than this.
_NARROW = 16


class Convolution(NamedTuple):
    """The arguments of `lax.conv_general_dilated` besides its operands.

    Attributes:
      strides, padding, base_dilation, dilation: for each spatial axis; padding in pairs.
      dims: `lax.ConvDimensionNumbers`.
      groups: the number of groups that features are split into.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    base_dilation: tuple[int, ...]
    dilation: tuple[int, ...]
    dims: Any
    groups: int

    def at_once(self, x: Array, kernel: Array) -> Array:
        """The convolution as XLA has it, but for the kernel's gradient where XLA is slow at it."""
        slow = self._has_many_groups(kernel) or self._is_narrow(x, kernel)
        return (_convolve if slow else _plain)(self, x, kernel)

    def _has_many_groups(self, kernel: Array) -> bool:
        """Whether it has more groups than features in one, such as a depthwise convolution.

        XLA on CPUs computes the kernel's gradient as that of a dense kernel, and drops all but the
        blocks of the groups: with 1,000 groups 1,000 times the work.
        """
        return self.groups > 1 and self.groups >= kernel.shape[self.dims.rhs_spec[1]]

    def _is_narrow(self, x: Array, kernel: Array) -> bool:
        """Whether few images and output features make the kernel's gradient slow on CPUs.

        XLA sums over the batch as if it were features, and over positions one by one; a library
        does so fast, which XLA does not call for so few features. With a single tap it is a product
        of matrices.
        """
        n_out, _, *window = (kernel.shape[i] for i in self.dims.rhs_spec)
        is_narrow = max(x.shape[self.dims.lhs_spec[0]], n_out) <= _NARROW
        on_cpu = jax.default_backend() == "cpu"
        return self.groups == 1 and is_narrow and math.prod(window) > 1 and on_cpu

    def by_taps(self, x: Array, kernel: Array) -> Array:
        """The convolution as a sum over taps.

        XLA's partitioner gathers the kernel of a grouped convolution on every device, or crashes.
        """
        kernel = kernel.transpose(self.dims.rhs_spec)
        n_out, n_in, *window = kernel.shape
        kernel = kernel.reshape(self.groups, n_out // self.groups, n_in, *window)
        products = [
            jnp.einsum(
                "bgi...,goi->bgo...", x_at_tap, kernel[(..., *tap)], precision=lax.Precision.HIGHEST
            )
            for tap, x_at_tap in self._at_taps(x, window)
        ]
        sums = functools.reduce(jnp.add, products)
        found = sums.reshape(len(sums), n_out, *sums.shape[3:])
        return found.transpose(np.argsort(self.dims.out_spec))

    def by_rows(self, x: Array, kernel: Array) -> Array:
        """The convolution of one group, with positions along the last axis as if they were images.

        What it reads at the taps along that axis are features; so XLA sums over both fast.
        """
        ones = (1,) * (len(self.strides) - 1)
        # Padded first: XLA on CPUs is wrong where an axis alone is cropped and padded.
        along_last = self._replace(
            strides=(*ones, self.strides[-1]), dilation=(*ones, self.dilation[-1])
        )
        along_others = Convolution(
            self.strides[:-1], ((0, 0),) * len(ones), ones, self.dilation[:-1], None, 1
        )
        kernel = kernel.transpose(self.dims.rhs_spec)
        n_out, _, *window = kernel.shape
        taps = [x for _, x in along_last._at_taps(x, (*ones, window[-1]))]
        # The axes are the images, last positions, last taps, features and other positions.
        rows = jnp.moveaxis(jnp.concatenate(taps, 1), -1, 1)
        images, n_last, _, _, *sizes = rows.shape
        rows = rows.reshape(images * n_last, -1, *sizes)
        kernel = jnp.moveaxis(kernel, -1, 1).reshape(n_out, -1, *window[:-1])
        found = _plain(along_others, rows, kernel)
        found = found.reshape(images, n_last, *found.shape[1:])
        return jnp.moveaxis(found, 1, -1).transpose(np.argsort(self.dims.out_spec))

    def _at_taps(self, x: Array, window: Sequence[int]) -> list[tuple[tuple[int, ...], Array]]:
        """For each tap what it reads, (batch, group, feature, *position)."""
        x = x.transpose(self.dims.lhs_spec)
        edges = [
            (low, high, step - 1)
            for (low, high), step in zip(self.padding, self.base_dilation, strict=True)
        ]
        x = lax.pad(x, jnp.float32(0), [(0, 0, 0), (0, 0, 0), *edges])
        batches, features, *sizes = x.shape
        x = x.reshape(batches, self.groups, features // self.groups, *sizes)
        reaches = [(n - 1) * step + 1 for n, step in zip(window, self.dilation, strict=True)]
        ends = [
            (size - reach) // stride * stride + 1
            for size, reach, stride in zip(sizes, reaches, self.strides, strict=True)
        ]

        def places(tap: tuple[int, ...]) -> tuple[slice, ...]:
            starts = [i * step for i, step in zip(tap, self.dilation, strict=True)]
            return tuple(
                slice(start, start + end, stride)
                for start, end, stride in zip(starts, ends, self.strides, strict=True)
            )

        taps = itertools.product(*map(range, window))
        return [(tap, x[(..., *places(tap))]) for tap in taps]


def _plain(how: Convolution, x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        *how,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(how: Convolution, x: Array, kernel: Array) -> Array:
    """`_plain` with a kernel's gradient of its own."""
    return _plain(how, x, kernel)


def _input_gradient(how: Convolution, x: Array, kernel: Array, cotangent: Array) -> Array:
    (gradient,) = jax.linear_transpose(lambda x: _plain(how, x, kernel), x)(cotangent)
    return gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kernel_gradient(how: Convolution, x: Array, kernel: Array, cotangent: Array) -> Array:
    """The gradient of `_convolve` in the kernel, of which only the shape is used."""
    if how.groups == 1:
        (found,) = jax.linear_transpose(functools.partial(how.by_rows, x), kernel)(cotangent)
        return found
    n_in, *window = (kernel.shape[i] for i in how.dims.rhs_spec[1:])
    at_output = cotangent.transpose(how.dims.out_spec)
    batches, n_out, *sizes = at_output.shape
    at_output = at_output.reshape(batches, how.groups, n_out // how.groups, *sizes)
    # Axes are the batch, groups, outputs, inputs and positions.
    products = [x[:, :, None] * at_output[:, :, :, None] for _, x in how._at_taps(x, window)]
    sums = jnp.stack(totals(products, (0, *range(4, products[0].ndim))), -1)
    gradient = sums.reshape(n_out, n_in, *window)
    return gradient.transpose(np.argsort(how.dims.rhs_spec))


def _backward(how: Convolution, factors: tuple[Array, Array], cotangent: Array) -> Any:
    x, kernel = factors
    return (
        _input_gradient(how, x, kernel, cotangent),
        _kernel_gradient(how, x, kernel, cotangent),
    )


def _twice_backward(how: Convolution, factors: tuple[Array, Array, Array], slope: Array) -> Any:
    x, kernel, cotangent = factors
    return (
        _input_gradient(how, x, slope, cotangent),
        jnp.zeros_like(kernel),
        _convolve(how, x, slope),
    )


_convolve.defvjp(lambda how, *factors: (_convolve(how, *factors), factors), _backward)
_kernel_gradient.defvjp(
    lambda how, *factors: (_kernel_gradient(how, *factors), factors), _twice_backward
)

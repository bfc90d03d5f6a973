"""Rules of what joins entries along axes: contractions, convolutions, reductions, windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from dpai_jax.compacting.cuts import Cut, fold, narrow
from dpai_jax.compacting.facts import (
    Fact,
    Flags,
    Kept,
    Shape,
    along,
    any_of,
    block,
    flags,
    indices,
    matmul,
    merged,
    rectangle,
    spread,
    within,
)
from dpai_jax.compacting.program import Step
from dpai_jax.compacting.rules import Rule, rule_for
from dpai_jax.tools.jaxprs import bind, shape_of


@rule_for("reduce_sum")
class Sum(Rule):
    """Sums over axes: frozen entries add one frozen number."""

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        (x,), axes = operands, tuple(step.params["axes"])
        shape = shape_of(step.eqn.outvars[0])
        live, filled = any_of(x.live, axes), any_of(x.filled, axes)
        return [Fact(shape, live, filled, x.activation)]

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        return [np.expand_dims(wanted[0], tuple(step.params["axes"]))]

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        (x,), axes, rest = operands, tuple(step.params["axes"]), list(kept[0] or ())
        target = tuple(x.own[i] if i in axes else rest.pop(0) for i in range(len(x.shape)))
        total = step.eqn.primitive.bind(x.at(target), **step.params)
        whole = tuple(None if i in axes else k for i, k in enumerate(target))
        outside = x.frozen_outside(tuple(k if i in axes else None for i, k in enumerate(target)))
        if np.any(within(outside, whole)):
            total = total + fold(
                step,
                operands,
                lambda: x.frozen_part(outside, whole, *axes).sum(axes, dtype=x.dtype),
            )
        return [total]


@rule_for(
    """
    argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce_and reduce_max reduce_min
    reduce_or reduce_prod reduce_window_max reduce_window_min reduce_window_sum sort top_k
    """
)
class Along(Rule):
    """Functions along some axes, of which all entries are put back; the other axes stay cut."""

    @staticmethod
    def _axes(step: Step) -> tuple[tuple[int, ...], bool]:
        """The axes along which entries meet, in order, and whether the results lack them."""
        params, rank = step.params, len(shape_of(step.eqn.invars[0]))
        if "axes" in params:
            return tuple(sorted(params["axes"])), True
        if "window_dimensions" in params:
            unit = (1, 1, (0, 0), 1, 1)
            each = zip(
                params["window_dimensions"],
                params["window_strides"],
                map(tuple, params["padding"]),
                params["base_dilation"],
                params["window_dilation"],
                strict=True,
            )
            return tuple(i for i, window in enumerate(each) if window != unit), False
        axis = params.get("axis", params.get("dimension", params.get("operand_axis", rank - 1)))
        return (axis % rank,), False

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        axes, dropped = Along._axes(step)
        shape = shape_of(step.eqn.outvars[0])
        live, filled = flags(operands[0].shape, False), flags(operands[0].shape, False)
        for x in operands:
            live, filled = live | x.live, filled | x.filled
        if step.kind in ("argmax", "argmin", "sort", "top_k", "cumlogsumexp"):
            filled = flags(operands[0].shape, True)
        live, filled = (any_of(f, axes, not dropped) for f in (live, filled))
        activation = any(x.activation for x in operands)
        return [Fact(shape_of(var), live, filled, activation) for var in step.eqn.outvars] or [
            Fact(shape, live, filled, activation)
        ]

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        axes, dropped = Along._axes(step)
        found = flags(operands[0].shape, False)
        for w in wanted:
            one = np.expand_dims(w, axes) if dropped else any_of(w, axes, True)
            found = found | one
        return [found] * len(operands)

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        axes, dropped = Along._axes(step)
        rank = len(operands[0].shape)
        others = [i for i in range(rank) if i not in axes]
        # Where the results are cut in different ways, what any of them keeps is computed.
        target: list[np.ndarray | None] = [None] * rank
        for place, i in enumerate(others):
            sets = [k[place if dropped else i] for k in kept if k is not None]
            if all(k is not None for k in sets):
                target[i] = np.unique(np.concatenate([k for k in sets if k is not None]))
        results = bind(step.eqn, *(x.at(tuple(target)) for x in operands))
        produced = tuple(target[i] for i in (others if dropped else range(rank)))
        return [
            None if k is None else narrow(y, produced, k, shape_of(var))
            for y, k, var in zip(results, kept, step.eqn.outvars, strict=True)
        ]


@rule_for("dot_general")
class Dot(Rule):
    """Contractions: what is zero in one factor is left out of both."""

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        a, b = operands
        filled = _contracted(step, a, b, a.filled, b.filled)
        live = _contracted(step, a, b, a.live, b.filled)
        live = live | _contracted(step, a, b, a.filled, b.live)
        shape = shape_of(step.eqn.outvars[0])
        return [Fact(shape, live, filled, a.activation or b.activation)]

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        pairs = ((operands[0], operands[1], 0), (operands[1], operands[0], 1))
        return [_factor_wants(step, results[0], a, b, wanted[0], side) for a, b, side in pairs]

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        (a, b), target = operands, kept[0]
        assert target is not None
        (ca, cb), (ba, bb) = step.params["dimension_numbers"]
        frees = [
            [i for i in range(len(x.shape)) if i not in (*c, *d)]
            for x, c, d in ((a, ca, ba), (b, cb, bb))
        ]
        at_a: list[np.ndarray | None] = [None] * len(a.shape)
        at_b: list[np.ndarray | None] = [None] * len(b.shape)
        rest = list(target)
        for i, j in zip(ba, bb, strict=True):
            at_a[i] = at_b[j] = rest.pop(0)
        for at, free in ((at_a, frees[0]), (at_b, frees[1])):
            for i in free:
                at[i] = rest.pop(0)
        outer = tuple(at_a), tuple(at_b)
        for i, j in zip(ca, cb, strict=True):
            at_a[i] = at_b[j] = _meeting(a, b, i, j, outer)
        y = lax.dot_general(a.at(tuple(at_a)), b.at(tuple(at_b)), **_options(step))
        outside = [x.frozen_outside(_only(at, c)) for x, at, c in ((a, at_a, ca), (b, at_b, cb))]
        a_frozen, b_frozen = (within(f, whole) for f, whole in zip(outside, outer, strict=True))
        if not _contracted(step, a.fact, b.fact, a_frozen, b_frozen, tight=True).any():
            return [y]
        whole = [(*ca, *ba), (*cb, *bb)]

        def compute() -> Any:
            parts = zip((a, b), outside, outer, whole, strict=True)
            left, right = (x.frozen_part(f, at, *axes) for x, f, at, axes in parts)
            return lax.dot_general(left, right, **_options(step))

        return [y + fold(step, operands, compute)]


def _options(step: Step) -> dict[str, Any]:
    names = ("dimension_numbers", "precision", "preferred_element_type")
    return {name: step.params[name] for name in names}


def _only(kept: Sequence[np.ndarray | None], axes: Sequence[int]) -> Kept:
    return tuple(k if i in axes else None for i, k in enumerate(kept))


def _meeting(a: Cut, b: Cut, i: int, j: int, outer: tuple[Kept, Kept]) -> np.ndarray | None:
    """The indices along a contracted axis at which a product is to be computed."""
    size = a.shape[i]
    there, both = np.zeros(size, bool), np.ones(size, bool)
    for x, axis, at in ((a, i, outer[0]), (b, j, outer[1])):
        both &= along(within(x.fact.filled, at), axis, size)
        if x.kept is not None:
            there[indices(x.kept[axis], size)] = True
    there &= both
    return None if there.all() else np.flatnonzero(there)


def _contracted(step: Step, a: Fact, b: Fact, x: Flags, y: Flags, tight: bool = False) -> Flags:
    """A contraction of flags; `tight` if they have been narrowed already."""
    (ca, cb), (ba, bb) = step.params["dimension_numbers"]
    shapes = [
        tuple(max(n, 1) for n in f.shape) if tight else fact.shape for f, fact in ((x, a), (y, b))
    ]
    if tight:
        shapes = _common(shapes, (ca, cb))
    fa = [i for i in range(x.ndim) if i not in (*ca, *ba)]
    fb = [i for i in range(y.ndim) if i not in (*cb, *bb)]
    batch = [x.shape[i] for i in ba], [y.shape[i] for i in bb]
    free = [x.shape[i] for i in fa], [y.shape[i] for i in fb]
    left = merged(x.transpose(*ba, *fa, *ca), _pick(shapes[0], ba, fa, ca), _last(x, ca))
    left = left.reshape(*batch[0], math.prod(free[0]), -1)
    right = merged(y.transpose(*bb, *fb, *cb), _pick(shapes[1], bb, fb, cb), _last(y, cb))
    right = right.reshape(*batch[1], math.prod(free[1]), -1)
    product = matmul(left, right.swapaxes(-1, -2))
    return product.reshape(*product.shape[: len(ba)], *free[0], *free[1])


def _common(shapes: list[Shape], contracted: Any) -> list[Shape]:
    """Shapes whose contracted axes have the larger of both sizes."""
    first, second = map(list, shapes)
    for i, j in zip(*contracted, strict=True):
        first[i] = second[j] = max(first[i], second[j])
    return [tuple(first), tuple(second)]


def _pick(shape: Shape, *axes: Sequence[int]) -> Shape:
    return tuple(shape[i] for group in axes for i in group)


def _last(x: Flags, axes: Sequence[int]) -> list[int]:
    return list(range(x.ndim - len(axes), x.ndim))


def _factor_wants(step: Step, result: Fact, a: Fact, b: Fact, wanted: Flags, side: int) -> Flags:
    """Where a factor has to be there: see `rules.matters`, here for sums of products."""
    (ca, cb), (ba, bb) = step.params["dimension_numbers"]
    if side:
        (ca, cb), (ba, bb) = (cb, ca), (bb, ba)
    fa = [i for i in range(len(a.shape)) if i not in (*ca, *ba)]
    fb = [i for i in range(len(b.shape)) if i not in (*cb, *bb)]
    n = len(ba)
    # The result's axes are those of the batch, of the first factor and of the second.
    order = list(range(wanted.ndim))
    mine = order[n + len(fb) :] if side else order[n : n + len(fa)]
    other = order[n : n + len(fb)] if side else order[n + len(fa) :]
    w = wanted.transpose(*order[:n], *mine, *other)
    w_sizes = [result.shape[i] for i in (*order[:n], *mine, *other)]

    def back(of_b: Flags) -> Flags:
        right = of_b.transpose(*bb, *fb, *cb)
        shape = _pick(b.shape, bb, fb, cb)
        held = all(w.shape[n + len(mine) + k] == 1 == right.shape[n + k] for k in range(len(fb)))
        left, axes_w = w, list(range(n + len(mine), w.ndim))
        axes_b = list(range(n, n + len(fb)))
        if not held:
            left, right = spread(w, tuple(w_sizes), *axes_w), spread(right, shape, *axes_b)
        left = left.reshape(*w.shape[:n], math.prod(w.shape[n : n + len(mine)]), -1)
        tail = right.shape[n + len(fb) :]
        right = right.reshape(*right.shape[:n], left.shape[-1], math.prod(tail))
        product = matmul(left, right)
        found = product.reshape(*product.shape[:n], *w.shape[n : n + len(mine)], *tail)
        return found.transpose(np.argsort([*ba, *fa, *ca]))

    if not result.activation:
        found = back(b.filled)
    else:
        found = np.where(a.live, back(b.filled), back(b.live))
    return found & a.filled


@rule_for("conv_general_dilated")
class Conv(Rule):
    """Convolutions, as contractions over input features, group by group."""

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        if step.params["batch_group_count"] > 1:
            return Rule.facts(step, operands)
        x, w = operands
        view = _View(step)
        shape = shape_of(step.eqn.outvars[0])

        def through(a: Flags, b: Flags) -> Flags:
            return view.result(matmul(view.features(a), view.kernel(b)))

        filled = through(x.filled, w.filled)
        live = through(x.live, w.filled) | through(x.filled, w.live)
        return [Fact(shape, live, filled, x.activation or w.activation)]

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        if step.params["batch_group_count"] > 1:
            return Rule.wants(step, operands, results, wanted)
        x, w = operands
        view = _View(step)
        y = view.outputs(view.closed(wanted[0]))
        of_x = [view.inputs(matmul(y, view.kernel(f).swapaxes(1, 2))) for f in (w.filled, w.live)]
        of_w = [
            view.weights(matmul(view.features(f).swapaxes(1, 2), y)) for f in (x.filled, x.live)
        ]
        if not results[0].activation:
            return [of_x[0] & x.filled, of_w[0] & w.filled]
        return [
            np.where(x.live, *of_x) & x.filled,
            np.where(w.live, *of_w) & w.filled,
        ]

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        target = kept[0]
        if step.params["batch_group_count"] > 1 or target is None:
            return Rule.evaluate(step, operands, kept)
        (x, w), view = operands, _View(step)
        groups, outs = view.split_outputs(target[view.y_feature])
        ins = view.meeting(x, w, groups, outs)
        flat_in = (groups[:, None] * view.n_in + ins).ravel()
        flat_out = (groups[:, None] * view.n_out + outs).ravel()
        at_x: list[np.ndarray | None] = [None] * len(x.shape)
        at_x[view.x_batch], at_x[view.x_feature] = target[view.y_batch], flat_in
        at_w: list[np.ndarray | None] = [None] * len(w.shape)
        at_w[view.w_in], at_w[view.w_out] = ins, flat_out
        y = view.convolve(x.at(tuple(at_x)), w.at(tuple(at_w)), len(groups))
        # What is frozen in both: the features of these groups that were left out.
        frozen_x = x.frozen_outside(_only(at_x, [view.x_feature]))
        frozen_w = w.frozen_outside(_only(at_w, [view.w_in]))
        rest = np.setdiff1d(np.arange(view.n_in), ins)
        at_x[view.x_feature] = (groups[:, None] * view.n_in + rest).ravel()
        at_w[view.w_in] = rest
        there = [within(f, tuple(at)) for f, at in ((frozen_x, at_x), (frozen_w, at_w))]
        if len(rest) and all(f.any() for f in there):
            rows, columns = tuple(at_x), tuple(at_w)

            def compute() -> Any:
                of_x = x.frozen_part(frozen_x, rows, *(i for i in range(rank) if i != view.x_batch))
                of_w = w.frozen_part(frozen_w, columns, *range(rank))
                return view.convolve(of_x, of_w, len(groups))

            rank = len(x.shape)
            y = y + fold(step, operands, compute)
        produced = [None] * len(target)
        produced[view.y_batch], produced[view.y_feature] = target[view.y_batch], flat_out
        return [narrow(y, tuple(produced), target, shape_of(step.eqn.outvars[0]))]


class _View:
    """A convolution as (groups, batch, inputs) times (groups, inputs, outputs)."""

    def __init__(self, step: Step):
        self.step = step
        self.groups = step.params["feature_group_count"]
        numbers = step.params["dimension_numbers"]
        self.x_batch, self.x_feature = numbers.lhs_spec[:2]
        self.w_out, self.w_in = numbers.rhs_spec[:2]
        self.y_batch, self.y_feature = numbers.out_spec[:2]
        self.x_shape, self.w_shape = (shape_of(var) for var in step.eqn.invars)
        self.y_shape = shape_of(step.eqn.outvars[0])
        self.n_in = self.w_shape[self.w_in]
        self.n_out = self.w_shape[self.w_out] // self.groups

    def _plane(self, x: Flags, shape: Shape, batch: int, feature: int) -> Flags:
        """(groups, batch, features of a group) of flags, over all positions."""
        x = any_of(x, [i for i in range(x.ndim) if i not in (batch, feature)], True)
        x = np.moveaxis(spread(x, shape, feature), (batch, feature), (0, 1))
        x = x.reshape(x.shape[0], self.groups, -1)
        return x.swapaxes(0, 1)

    def _unplane(self, x: Flags, rank: int, batch: int, feature: int) -> Flags:
        x = x.swapaxes(0, 1).reshape(x.shape[1], -1)
        x = x.reshape(*x.shape, *(1,) * (rank - 2))
        return np.moveaxis(x, (0, 1), (batch, feature))

    def features(self, x: Flags) -> Flags:
        """The input's flags as (groups, batch, inputs)."""
        return self._plane(x, self.x_shape, self.x_batch, self.x_feature)

    def inputs(self, x: Flags) -> Flags:
        """The inverse of `features`."""
        return self._unplane(x, len(self.x_shape), self.x_batch, self.x_feature)

    def outputs(self, y: Flags) -> Flags:
        """The result's flags as (groups, batch, outputs)."""
        return self._plane(y, self.y_shape, self.y_batch, self.y_feature)

    def result(self, y: Flags) -> Flags:
        """The inverse of `outputs`."""
        return self._unplane(y, len(self.y_shape), self.y_batch, self.y_feature)

    def kernel(self, w: Flags) -> Flags:
        """The kernel's flags, over all taps, as (groups, inputs, outputs)."""
        w = any_of(w, [i for i in range(w.ndim) if i not in (self.w_in, self.w_out)], True)
        w = np.moveaxis(
            spread(w, self.w_shape, self.w_in, self.w_out), (self.w_in, self.w_out), (0, 1)
        )
        return w.reshape(self.n_in, self.groups, self.n_out).swapaxes(0, 1)

    def weights(self, w: Flags) -> Flags:
        """The inverse of `kernel`."""
        w = w.swapaxes(0, 1).reshape(self.n_in, -1)
        w = w.reshape(*w.shape, *(1,) * (len(self.w_shape) - 2))
        return np.moveaxis(w, (0, 1), (self.w_in, self.w_out))

    def closed(self, y: Flags) -> Flags:
        """Flags with the same outputs in each group that has any."""
        if self.groups == 1:
            return y
        return self.result(rectangle(self.outputs(y)))

    def split_outputs(self, kept: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """The groups, and the outputs within each, that hold all outputs to keep."""
        kept = indices(kept, self.y_shape[self.y_feature])
        return np.unique(kept // self.n_out), np.unique(kept % self.n_out)

    def meeting(self, x: Cut, w: Cut, groups: np.ndarray, outs: np.ndarray) -> np.ndarray:
        """The inputs of each group over which a product is to be computed."""
        have_x = self.features(block(x.own, x.shape))[groups].any((0, 1))
        have_w = np.zeros(self.n_in, bool)
        have_w[indices(w.own[self.w_in], self.n_in)] = True
        filled = self.features(x.fact.filled)[groups].any(1)[:, :, None]
        filled = filled & self.kernel(w.fact.filled)[groups][:, :, outs]
        return np.flatnonzero((have_x | have_w) & filled.any((0, 2)))

    def convolve(self, x: Any, w: Any, groups: int) -> jax.Array:
        """The convolution of cut operands."""
        params = self.step.params
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers")
        options = {name: params[name] for name in names}
        more = {name: params[name] for name in ("precision", "preferred_element_type")}
        return lax.conv_general_dilated(x, w, **options, **more, feature_group_count=groups)

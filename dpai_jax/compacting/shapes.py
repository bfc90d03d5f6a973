"""Rules of what moves entries about: transposes, slices, concatenations, reshapes, look-ups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from dpai_jax.compacting.cuts import Cut, narrow, take
from dpai_jax.compacting.facts import Fact, Flags, Kept, Shape, any_of, flags, indices, spread
from dpai_jax.compacting.program import Step
from dpai_jax.compacting.rules import Rule, rule_for
from dpai_jax.paths.rules.shape import reshape_groups
from dpai_jax.tools.jaxprs import shape_of


class Source(NamedTuple):
    """Where the entries along one axis of a result come from.

    Attributes:
      axis: the operand's axis; None for an axis that is new.
      places: for each index of the result that of the operand, negative where it is from
        elsewhere; None where all indices are the same.
    """

    axis: int | None
    places: np.ndarray | None = None


Sources = list[Source]


def _sources(step: Step) -> list[list[Sources]]:
    """For each result and each operand, the sources of the result's axes."""
    shapes = [shape_of(var) for var in step.eqn.invars]
    shape, result = shapes[0], shape_of(step.eqn.outvars[0])
    params = step.params
    match step.kind:
        case "transpose":
            return [[[Source(i) for i in params["permutation"]]]]
        case "squeeze":
            dropped = {i % len(shape) for i in params["dimensions"]}
            return [[[Source(i) for i in range(len(shape)) if i not in dropped]]]
        case "broadcast_in_dim":
            sources = [Source(None)] * len(result)
            for i, j in enumerate(params["broadcast_dimensions"]):
                sources[j] = Source(i, _same(shape[i], result[j]))
            return [[sources]]
        case "slice":
            strides = params["strides"] or (1,) * len(shape)
            starts = zip(params["start_indices"], strides, result, shape, strict=True)
            runs = [(start + stride * np.arange(n), size) for start, stride, n, size in starts]
            return [[[Source(i, _unless_all(run, n)) for i, (run, n) in enumerate(runs)]]]
        case "rev":
            flipped = params["dimensions"]
            return [
                [[Source(i, np.arange(n)[::-1] if i in flipped else None) for i, n in _each(shape)]]
            ]
        case "split":
            return _split(params, shape)
        case "concatenate":
            return _concatenated(params, shapes, result)
    return _pad(params, shape, result)


def _split(params: dict[str, Any], shape: Shape) -> list[list[Sources]]:
    starts, at = itertools.accumulate(params["sizes"], initial=0), params["axis"]
    return [
        [[Source(i, start + np.arange(size) if i == at else None) for i, _ in _each(shape)]]
        for start, size in zip(starts, params["sizes"], strict=False)
    ]


def _concatenated(
    params: dict[str, Any], shapes: Sequence[Shape], result: Shape
) -> list[list[Sources]]:
    at, first = params["dimension"], 0
    parts = []
    for part in shapes:
        run = np.arange(result[at]) - first
        run = np.where((run >= 0) & (run < part[at]), run, -1)
        parts.append([Source(i, run if i == at else None) for i, _ in _each(result)])
        first += part[at]
    return [parts]


def _pad(params: dict[str, Any], shape: Shape, result: Shape) -> list[list[Sources]]:
    sources = []
    for i, (low, _, inner) in enumerate(params["padding_config"]):
        place = np.arange(result[i]) - low
        run = place // (inner + 1)
        there = (place % (inner + 1) == 0) & (run >= 0) & (run < shape[i])
        sources.append(Source(i, _unless_all(np.where(there, run, -1), shape[i])))
    return [[sources, [Source(None)] * len(result)]]


def _each(shape: Shape) -> enumerate[int]:
    return enumerate(shape)


def _same(size: int, full: int) -> np.ndarray | None:
    return None if size == full else np.zeros(full, int)


def _unless_all(places: np.ndarray, size: int) -> np.ndarray | None:
    return None if np.array_equal(places, np.arange(size)) else places


def _forward(x: Flags, sources: Sources) -> Flags:
    """Flags moved as the operation moves entries; none where an entry is from elsewhere."""
    axes = [source.axis for source in sources if source.axis is not None]
    rest = [i for i in range(x.ndim) if i not in axes]
    x = x.transpose(*axes, *rest).reshape([x.shape[i] for i in axes])
    x = np.expand_dims(x, tuple(j for j, source in enumerate(sources) if source.axis is None))
    for j, source in enumerate(sources):
        if source.places is None or (x.shape[j] == 1 and np.all(source.places >= 0)):
            continue
        size = max(x.shape[j], int(source.places.max(initial=-1)) + 1)
        x = np.take(spread(x, (*x.shape[:j], size, *x.shape[j + 1 :]), j), source.places, j)
        x = x & (source.places >= 0).reshape([-1 if k == j else 1 for k in range(x.ndim)])
    return x


def _backward(x: Flags, sources: Sources, shape: Shape, result: Shape) -> Flags:
    """Where the operand has entries that a flagged entry of the result is from."""
    for j, source in enumerate(sources):
        if source.axis is None:
            x = any_of(x, [j], keepdims=True)
        elif source.places is not None:
            x = np.moveaxis(spread(x, (*x.shape[:j], result[j], *x.shape[j + 1 :]), j), j, 0)
            moved = np.zeros((shape[source.axis], *x.shape[1:]), bool)
            there = source.places >= 0
            np.logical_or.at(moved, source.places[there], x[there])
            x = np.moveaxis(moved, 0, j)
    axes = [source.axis for source in sources if source.axis is not None]
    x = x.reshape([x.shape[j] for j, source in enumerate(sources) if source.axis is not None])
    x = np.expand_dims(x, tuple(range(len(axes), len(shape))))
    rest = [i for i in range(len(shape)) if i not in axes]
    return x.transpose(np.argsort([*axes, *rest]))


@rule_for("transpose squeeze broadcast_in_dim slice rev split concatenate pad")
class Moves(Rule):
    """Each axis of a result is an axis of an operand, rearranged, or new."""

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        facts = []
        for var, parts in zip(step.eqn.outvars, _sources(step), strict=True):
            shape = shape_of(var)
            live, filled = flags(shape, False), flags(shape, False)
            for x, sources in zip(operands, parts, strict=True):
                live = live | _forward(x.live, sources)
                filled = filled | _forward(x.filled, sources)
            facts.append(Fact(shape, live, filled, any(x.activation for x in operands)))
        return facts

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        found = [flags(x.shape, False) for x in operands]
        for result, w, parts in zip(results, wanted, _sources(step), strict=True):
            for k, (x, sources) in enumerate(zip(operands, parts, strict=True)):
                found[k] = found[k] | _backward(w, sources, x.shape, result.shape)
        return found

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        results: list[Any] = []
        for var, k, parts in zip(step.eqn.outvars, kept, _sources(step), strict=True):
            shape = shape_of(var)
            if k is None:
                results.append(None)
            elif step.kind == "concatenate":
                results.append(_joined(operands, parts, k, step.params["dimension"], shape))
            elif step.kind == "pad":
                results.append(_padded(step, operands, parts[0], k, shape))
            else:
                results.append(_arranged(operands[0], parts[0], k, shape))
        return results


def _arranged(x: Cut, sources: Sources, target: Kept, shape: Shape) -> Any:
    """The part of a result that comes from one operand."""
    wanted: list[np.ndarray | None] = [None] * len(x.shape)
    sizes = [n if k is None else len(k) for k, n in zip(target, shape, strict=True)]
    for source, k in zip(sources, target, strict=True):
        if source.axis is not None and source.places is None:
            wanted[source.axis] = k
        elif source.axis is not None and source.places is not None:
            repeated = x.shape[source.axis] == 1
            wanted[source.axis] = None if repeated else source.places[k if k is not None else ...]
    axes = [source.axis for source in sources if source.axis is not None]
    array = x.at(tuple(wanted))
    rest = [i for i in range(array.ndim) if i not in axes]
    array = jnp.squeeze(jnp.transpose(array, (*axes, *rest)), tuple(range(len(axes), array.ndim)))
    named = [j for j, source in enumerate(sources) if source.axis is not None]
    return lax.broadcast_in_dim(array, sizes, named)


def _joined(
    operands: Sequence[Cut], parts: Sequence[Sources], target: Kept, at: int, shape: Shape
) -> Any:
    wanted = indices(target[at], shape[at])
    arrays = []
    for x, sources in zip(operands, parts, strict=True):
        places = sources[at].places
        assert places is not None
        mine = places[wanted]
        mine = mine[mine >= 0]
        if len(mine):
            own = None if len(mine) == x.shape[at] else mine
            arrays.append(x.at((*target[:at], own, *target[at + 1 :])))
    return lax.concatenate(arrays, at)


def _padded(
    step: Step, operands: Sequence[Cut], sources: Sources, target: Kept, shape: Shape
) -> Any:
    """A padded block: along an axis of which only padded indices go, no padding is needed."""
    x, fill = operands
    config, wanted, produced = [], [], []
    for axis, (source, k) in enumerate(zip(sources, target, strict=True)):
        inner = source.places is None or (k is not None and np.all(source.places[k] >= 0))
        config.append((0, 0, 0) if inner else step.params["padding_config"][axis])
        places = k if source.places is None or k is None else source.places[k]
        wanted.append(places if inner else None)
        produced.append(k if inner else None)
    array = lax.pad(x.at(tuple(wanted)), fill.at(()), config)
    return narrow(array, tuple(produced), target, shape)


@rule_for("reshape")
class Reshape(Rule):
    """The same entries in the same order, in other axes."""

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        shape, (x,) = shape_of(step.eqn.outvars[0]), operands[:1]
        live, filled = (_reshaped(f, x.shape, shape) for f in (x.live, x.filled))
        return [Fact(shape, live, filled, x.activation)]

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        return [_reshaped(wanted[0], results[0].shape, operands[0].shape)]

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        x, shape, (target,) = operands[0], shape_of(step.eqn.outvars[0]), kept
        assert target is not None
        wanted: list[np.ndarray | None] = [None] * len(x.shape)
        sizes, chosen = [], []
        for before, after in reshape_groups(x.shape, shape):
            outer = _flat([target[j] for j in after], [shape[j] for j in after])
            places = np.unravel_index(outer, [x.shape[i] for i in before])
            for i, at in zip(before, places, strict=True):
                unique = np.unique(at)
                wanted[i] = None if len(unique) == x.shape[i] else unique
            inner = _flat([wanted[i] for i in before], [x.shape[i] for i in before])
            sizes.append(len(inner))
            chosen.append(np.searchsorted(inner, outer))
        array = x.at(tuple(wanted)).reshape(sizes)
        for axis, places_ in enumerate(chosen):
            array = take(array, axis, places_)
        return [
            array.reshape([n if k is None else len(k) for k, n in zip(target, shape, strict=True)])
        ]


def _flat(kept: Sequence[np.ndarray | None], sizes: Sequence[int]) -> np.ndarray:
    """The numbers, in C order, of a block of indices."""
    each = [indices(k, n) for k, n in zip(kept, sizes, strict=True)]
    return np.ravel_multi_index(np.meshgrid(*each, indexing="ij"), sizes).ravel()


def _reshaped(x: Flags, old: Shape, new: Shape) -> Flags:
    """Flags in another shape; runs of axes that are held once stay so."""
    if math.prod(old) == 0:
        return flags(new, bool(x.any()))
    sizes = [1] * len(new)
    for before, after in reshape_groups(old, new):
        if any(x.shape[i] > 1 for i in before):
            x = spread(x, old, *before)
            for j in after:
                sizes[j] = new[j]
    return x.reshape(sizes)


@rule_for("gather")
class Gather(Rule):
    """Look-ups: axes that are taken whole pass, the others are looked up in."""

    @staticmethod
    def _passing(step: Step) -> dict[int, int]:
        """The result's axis for each axis of the operand that passes."""
        numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
        shape = shape_of(step.eqn.invars[0])
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        window = [i for i in range(len(shape)) if i not in gone]
        pairs = zip(window, numbers.offset_dims, strict=True)
        looked_up = numbers.start_index_map
        return {i: j for i, j in pairs if sizes[i] == shape[i] and i not in looked_up}

    @staticmethod
    def facts(step: Step, operands: Sequence[Fact]) -> list[Fact]:
        """See `Rule`."""
        shape, (x, where) = shape_of(step.eqn.outvars[0]), operands[:2]
        passing = Gather._passing(step)

        def moved(f: Flags) -> Flags:
            rest = tuple(i for i in range(f.ndim) if i not in passing)
            f = any_of(f, rest, keepdims=True)
            sources = [Source(None)] * len(shape)
            for i, j in passing.items():
                sources[j] = Source(i)
            return _forward(f, sources)

        live, filled = moved(x.live), moved(x.filled)
        if step.params.get("fill_value") is not None:
            filled = flags(shape, True)
        if where.live.any():
            live = filled
        return [Fact(shape, live, filled, x.activation or where.activation)]

    @staticmethod
    def wants(
        step: Step, operands: Sequence[Fact], results: Sequence[Fact], wanted: Sequence[Flags]
    ) -> list[Flags]:
        """See `Rule`."""
        x, where = operands[:2]
        sources = [Source(None)] * len(results[0].shape)
        for i, j in Gather._passing(step).items():
            sources[j] = Source(i)
        found = _backward(wanted[0], sources, x.shape, results[0].shape)
        return [found, flags(where.shape, True)]

    @staticmethod
    def evaluate(step: Step, operands: Sequence[Cut], kept: Sequence[Kept | None]) -> list[Any]:
        """See `Rule`."""
        (x, where), target = operands[:2], kept[0]
        assert target is not None
        sizes = list(step.params["slice_sizes"])
        wanted: list[np.ndarray | None] = [None] * len(x.shape)
        produced: list[Any] = [None] * len(target)
        for i, j in Gather._passing(step).items():
            wanted[i] = produced[j] = k = target[j]
            sizes[i] = sizes[i] if k is None else len(k)
        params = step.params | {"slice_sizes": tuple(sizes)}
        array = step.eqn.primitive.bind(
            x.at(tuple(wanted)), where.at((None,) * len(where.shape)), **params
        )
        return [narrow(array, tuple(produced), target, shape_of(step.eqn.outvars[0]))]

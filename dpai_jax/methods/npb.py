"""NPB: integer programs, layer by layer, that balance effective nodes, paths and kernels."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import optimize, sparse

from dpai_jax.allocation import apportion, erk
from dpai_jax.masks import from_layers
from dpai_jax.methods.base import Allocation, Problem, Pruned, numpy_generator, score_tree
from dpai_jax.paths import Layer, Network
from dpai_jax.paths.trees import check_structure

# Of more pairs of an input and an output feature, a layer is solved in chunks.
_LARGE = 64 * 32

# Fewer paths than this fraction of a layer's largest number are the rounding of a convolution.
_ROUNDING = 1e-7


@dataclasses.dataclass(frozen=True)
class NPB:
    """Node-Path Balancing.

    The layers are pruned one after another, as an input passes them. With P_i the number of paths
    into input feature i of a layer under the masks already chosen, and m_ij ∈ {0, …, taps} the
    number of weights kept in the kernel that joins it to output feature j, a layer's m is the
    maximum under Σ m_ij = k of

        α·f_n/max f_n + (1 − α)·f_p/max f_p + β·R/max |R|,
        f_n = Σ_i min(P_i Σ_j m_ij, 1) + Σ_j min(Σ_i m_ij P_i, 1)   effective nodes,
        f_p = Σ_ij m_ij P_i                                         paths,
        R = Σ_ij min(m_ij − 1, 0)                                   empty kernels, negative.

    Each maximum is over all masks of the layer, whatever their number of weights: the number of
    its features, the paths with all weights kept, the number of its kernels. The weights of a
    kernel are then placed in it at random, where they read something. At last the kept weights
    that no path passes are moved, within their layer, to places where a path passes them: into the
    kernels of most effective weights first, and of the input features of most effective weights.

    What the paper leaves open is decided so: P_i sums over the positions at which the layer reads
    feature i, and is the mean over its taps. One path is the unit of the node count, so P_i enters
    it as 1 wherever it is not zero. Groups share nothing but k. Among solutions of one value the
    key chooses, and the weights of a feature are spread evenly over the output features. Copies of
    layers that are stacked in one kernel are layers of their own, in the order of the stack.

    Attributes:
      alpha: weight of nodes against paths, in [0, 1]. At the published .01 a layer leaves features
        of fewer paths out; at .1 it hardly does.
      beta: weight of the kernels, not negative.
      chunk: a layer of more than 2048 pairs of features is solved in parts of so many output
        features, each with its share of k.
      allocation: weights to keep per layer, `allocation(net, sparsity)`: `dpai_jax.erk`, or another
        function that says it for each layer.

    Raises:
      ValueError: if a number is out of its range.

    References:
      Pham et al., Towards Data-Agnostic Pruning At Initialization: What Makes a Good Sparse Mask?,
      NeurIPS 2023.
    """

    alpha: float = 0.01
    beta: float = 1.0
    chunk: int = 32
    allocation: Allocation = erk

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not self.beta >= 0:
            raise ValueError(f"beta must not be negative, got {self.beta}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`). The scores are one where a weight is kept."""
        net = problem.net
        rng = numpy_generator(problem.key)
        keep = self.allocation(net, problem.sparsity)
        check_structure(keep, net.treedef, "allocation", "params")
        counts = [np.ravel(k) for k in net.leaves(keep)]
        masks = [jnp.ones(layer.shape, jnp.float32) for layer in net.layers]
        turns = list(_turns(net.layers))
        for step, (i, copy) in enumerate(turns):
            layer, chosen = net.layers[i], _by_features(net.layers[i], np.array(masks[i]))
            incoming = _by_features(layer, np.asarray(_incoming(net, masks)[i]))[copy]
            chosen[copy] = mask = self._solve(layer, incoming, int(counts[i][copy]), rng)
            masks[i] = jnp.asarray(_as_kernel(layer, chosen))
            kernels = mask.any(2)
            numbers = {"nodes": int(kernels.any(0).sum()), "kernels": int(kernels.sum())}
            problem.report(step + 1, len(turns), numbers)
        scores = _moved(net, masks, rng)
        # Where something is to choose further, as in a repair, all that is left is chance.
        rank = [score + rng.random(score.shape, np.float32) for score in scores]
        kept = from_layers(net, [score > 0 for score in scores])
        return Pruned(kept, score_tree(net, scores), rank=lambda: score_tree(net, rank))

    def _solve(
        self, layer: Layer, incoming: np.ndarray, keep: int, rng: np.random.Generator
    ) -> np.ndarray:
        """The mask (inputs, outputs, taps) of a layer, from the paths that enter at each weight."""
        inputs, outputs, taps = incoming.shape
        if keep == 0:
            return np.zeros(incoming.shape, np.float32)
        group = _group_of_outputs(layer)
        groups = range(group.max() + 1)
        paths = np.stack([incoming[:, group == g].mean((1, 2)) for g in groups])
        paths = np.where(paths > _ROUNDING * paths.max(), paths, 0) if paths.any() else paths + 1
        parts = min(-(-outputs // self.chunk), keep) if inputs * outputs > _LARGE else 1
        chunks = np.array_split(np.arange(outputs), parts)
        sizes = [inputs * taps * len(chunk) for chunk in chunks]
        counts = np.zeros((inputs, outputs), int)
        for chunk, part in zip(chunks, apportion(keep, sizes, sizes), strict=True):
            members = {g: chunk[group[chunk] == g] for g in groups if np.any(group[chunk] == g)}
            widths = np.asarray([len(columns) for columns in members.values()])
            rows = balanced(paths[list(members)], widths, taps, part, self.alpha, self.beta, rng)
            for (g, columns), row in zip(members.items(), rows, strict=True):
                counts[:, columns] = _spread_over(row, paths[g], len(columns), rng)
        return _placed(counts, incoming, rng)


def balanced(
    paths: np.ndarray,
    widths: np.ndarray,
    taps: int,
    keep: int,
    alpha: float,
    beta: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """How many weights each input feature keeps at the optimum of NPB's integer program.

    The objective does not tell the output features of a group apart. So of an input feature only
    the number of its weights matters: the first is worth a node, each of the first `width`, which
    begin kernels of their own, is worth a kernel, and each its paths. Output features are worth a
    node each up to the number of such kernels of living input features, as these can always be
    chosen so that none is missed. This program has three variables for each input feature in place
    of one for each kernel, and the same optimum. Its constraints are sums over nested sets, so all
    vertices of its linear relaxation are integers, and the simplex method, which ends at a vertex,
    needs no branching.

    Args:
      paths: (groups, inputs) numbers of paths into the input features of each group.
      widths: (groups,) numbers of output features of each group.
      taps: the number of weights of a kernel.
      keep: the number of weights to keep.
      alpha: see `NPB`.
      beta: see `NPB`.
      rng: chooses among equals.

    Returns:
      (groups, inputs) numbers of weights that sum to `keep`.
    """
    groups, inputs = paths.shape
    kernels = inputs * widths.sum()
    # Each term over its maximum, and all of them times the number of weights, so that the
    # solver's tolerances are small beside what one weight is worth.
    size = kernels * taps
    node = alpha * size / (paths.size + widths.sum())
    path = (1 - alpha) * size / (taps * np.sum(paths * widths[:, None]) or 1.0)
    order = rng.permuted(np.broadcast_to(np.arange(inputs), paths.shape), axis=1)
    paths = np.take_along_axis(paths, order, 1)
    width = np.broadcast_to(widths[:, None], paths.shape).ravel()
    alive, gain = (paths > 0).ravel(), path * paths.ravel()

    # For each input feature its first weight, the others that begin a kernel, and the rest; for
    # each group the output features that are reached.
    worth = [node * alive + beta * taps + gain, beta * taps + gain, gain, np.full(groups, node)]
    upper = [np.ones(width.size), width - 1, (taps - 1) * width, widths]
    members = sparse.kron(sparse.eye_array(groups), np.ones((1, inputs))).multiply(alive)
    none = sparse.csr_array((groups, width.size))
    missed = sparse.hstack([-members, -members, none, sparse.eye_array(groups)])
    total = np.r_[np.ones(3 * width.size), np.zeros(groups)][None]
    solution = optimize.linprog(
        -np.concatenate(worth),
        A_ub=missed,
        b_ub=np.zeros(groups),
        A_eq=sparse.csr_array(total),
        b_eq=[keep],
        bounds=np.stack([np.zeros(3 * width.size + groups), np.concatenate(upper)], 1),
        method="highs-ds",
    )
    if not solution.success:
        raise RuntimeError(f"the integer program of a layer was not solved: {solution.message}")
    parts = np.rint(solution.x[: 3 * width.size]).astype(int).reshape(3, groups, inputs)
    rows = np.empty_like(parts[0])
    np.put_along_axis(rows, order, parts.sum(0), 1)
    return rows


def _spread_over(
    row: np.ndarray, paths: np.ndarray, width: int, rng: np.random.Generator
) -> np.ndarray:
    """The weights of each kernel (inputs, width), where an input feature has `row` in all.

    Each input feature in turn, that of most paths first, leads to the output features that fewest
    paths lead to yet; so none is missed as long as there are weights for it.
    """
    counts = np.zeros((len(row), width), int)
    leading = np.zeros(width)
    for i in np.lexsort((rng.random(len(row)), -paths)):
        whole, rest = divmod(row[i], width)
        counts[i] = whole
        counts[i, np.lexsort((rng.random(width), leading))[:rest]] += 1
        leading += counts[i] * paths[i]
    return counts


def _placed(counts: np.ndarray, incoming: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask (inputs, outputs, taps) of so many weights in each kernel, at random."""
    # A tap that only ever reads padding comes last.
    order = np.argsort(rng.random(incoming.shape) + (incoming <= 0), axis=2)
    mask = np.zeros(incoming.shape, np.float32)
    np.put_along_axis(mask, order, np.arange(incoming.shape[2]) < counts[..., None], 2)
    return mask


def _moved(net: Network, masks: list[Array], rng: np.random.Generator) -> list[Array]:
    """The masks with weights that no path passes at places where one does, as far as there are."""
    moves = 1
    while moves:
        moves = 0
        effective = [m * r for m, r in zip(masks, _reached(net, masks), strict=True)]
        # A place must not count on a weight that is to leave.
        reached = _reached(net, effective)
        for i, layer in enumerate(net.layers):
            views = (_by_features(layer, np.array(x[i])) for x in (masks, effective, reached))
            copies, *rest = views
            for kept, live, place in zip(copies, *rest, strict=True):
                moves += _move(kept, live > 0, place > 0, rng)
            masks = [*masks[:i], jnp.asarray(_as_kernel(layer, copies)), *masks[i + 1 :]]
    return masks


def _move(
    kept: np.ndarray, effective: np.ndarray, reached: np.ndarray, rng: np.random.Generator
) -> int:
    """Moves the dead weights of one mask (inputs, outputs, taps) in place; returns how many."""
    dead, free = np.argwhere((kept > 0) & ~effective), np.argwhere((kept == 0) & reached)
    of_kernel, of_input = effective.sum(2), effective.sum((1, 2))
    # Kernels of equal standing are filled one after another.
    chance = rng.random(of_kernel.shape)
    i, j, _ = free.T
    order = np.lexsort((chance[i, j], -of_input[i], -of_kernel[i, j]))
    moves = min(len(dead), len(free))
    kept[tuple(rng.permutation(dead)[:moves].T)] = 0
    kept[tuple(free[order[:moves]].T)] = 1
    return moves


def _turns(layers: tuple[Layer, ...]) -> Iterator[tuple[int, int]]:
    """Layers and copies in the order in which an input passes them.

    Of layers in a row of which there are equally many copies all first copies come first.
    """
    for copies, run in itertools.groupby(range(len(layers)), lambda i: layers[i].copies):
        members = list(run)
        yield from ((i, copy) for copy in range(copies) for i in members)


def _group_of_outputs(layer: Layer) -> np.ndarray:
    """The group of each output feature."""
    sizes = [layer.shape[i] for i in layer.outputs]
    if layer.groups in sizes:
        # The groups are an axis of their own, as those of a batched product.
        return np.indices(sizes)[sizes.index(layer.groups)].ravel()
    outputs = math.prod(sizes)
    groups = layer.groups if outputs % layer.groups == 0 else 1
    return np.arange(outputs) // (outputs // groups)


def _axes(layer: Layer) -> tuple[list[int], list[int]]:
    """A kernel's axes by what they are, and its sizes as (stack, inputs, outputs, taps)."""
    order: list[int] = []
    sizes: list[int] = []
    for axes in (layer.stack, layer.inputs, layer.outputs, range(len(layer.shape))):
        new = [i for i in axes if i not in order]
        order += new
        sizes.append(math.prod(layer.shape[i] for i in new))
    return order, sizes


def _by_features(layer: Layer, kernel: np.ndarray) -> np.ndarray:
    """A kernel as (stack, inputs, outputs, taps)."""
    axes, sizes = _axes(layer)
    return kernel.transpose(axes).reshape(sizes)


def _as_kernel(layer: Layer, array: np.ndarray) -> np.ndarray:
    """The inverse of `_by_features`."""
    axes, _ = _axes(layer)
    return array.reshape([layer.shape[i] for i in axes]).transpose(np.argsort(axes))


@functools.partial(jax.jit, static_argnums=0)
def _incoming(net: Network, masks: list[Array]) -> list[Array]:
    return net.incoming(masks)


@functools.partial(jax.jit, static_argnums=0)
def _reached(net: Network, masks: list[Array]) -> list[Array]:
    return net.reached(masks)

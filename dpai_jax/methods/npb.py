"""NPB: integer programs, layer by layer, that balance effective nodes, paths and kernels."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dpai_jax import checks
from dpai_jax.allocation import Allocation, apportion, check_allocation, erk
from dpai_jax.counts import reached
from dpai_jax.methods.base import Problem, Pruned, Report
from dpai_jax.paths import Interpreter, KernelUse, Network, Spread
from dpai_jax.paths.channels import numbered_weights
from dpai_jax.tools.meshes import on_host
from dpai_jax.tools.random import numpy_generator

# A layer with more pairs of an input and an output feature than this is solved in chunks.
_LARGE = 64 * 32

# Path counts below this fraction of a layer's largest are rounding errors of a convolution.
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
    kernel are then placed in it at random, where they read something. Last, kept weights that no
    path passes are moved within their layer to where one does: first into the kernels, and of the
    input features, that have the most effective weights.

    The paper leaves some points open. Here P_i is summed over the positions at which the layer
    reads feature i, and averaged over the taps. In the node count P_i is 1 wherever it is not zero.
    Groups share only k. The key chooses among solutions of equal value. The weights of a feature
    are spread evenly over the output features. Copies of a layer that are stacked in one kernel are
    layers of their own, in the order of the stack.

    Example:
      >>> import jax.numpy as jnp, dpai_jax as dpai
      >>> fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((4, 2))}
      >>> method = dpai.NPB(alpha=0.1)
      >>> result = dpai.prune(fn, params, jnp.ones((1, 4)), 0.5, method=method)
      >>> result.topology.weights
      4

    Attributes:
      alpha: weight of nodes against paths, in [0, 1]. At the published .01 a layer leaves features
        with few paths out; at .1 it rarely does.
      beta: weight of the kernels, not negative.
      chunk: the number of output features solved together in a layer of more than 2048 pairs of
        features; each chunk has its share of k.
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
        checks.number("alpha", self.alpha, *checks.FRACTION)
        checks.number("beta", self.beta, "zero or more", lambda beta: beta >= 0)
        checks.whole("chunk", self.chunk, 1)
        check_allocation(self.allocation)

    def run(self, problem: Problem) -> Pruned:
        """Prunes a network (see `dpai_jax.prune`).

        Args:
          problem: the network and the sparsity.

        Returns:
          The masks; the scores are one for a weight that is kept, else zero.

        Raises:
          ValueError: if the allocation gives one number for all layers.
        """
        problem.refuse_groups("NPB")
        net, rng = problem.net, numpy_generator(problem.key)
        keep = problem.keep(self.allocation)
        if not isinstance(keep, list):
            raise ValueError(f"allocation must give a number for each layer, got {keep} for all")
        masks = _Choice(self, net, keep, rng, problem.report).masks()
        scores = _moved(net, masks, rng)
        # A repair chooses at random.
        noise = [rng.random(score.shape, np.float32) for score in scores]
        chosen = [jnp.asarray(score > 0) for score in scores]
        rank = [jnp.asarray(score + n) for score, n in zip(scores, noise, strict=True)]
        return Pruned(chosen, list(map(jnp.asarray, scores)), rank=lambda: rank)

    def solve(self, incoming: np.ndarray, keep: int, rng: np.random.Generator) -> np.ndarray:
        """The mask of a layer, from the paths that enter at each weight.

        Args:
          incoming: the paths, (groups, inputs, outputs, taps).
          keep: how many weights to keep.
          rng: the generator.

        Returns:
          float32 array of that shape.
        """
        n_groups, inputs, per_group, taps = incoming.shape
        incoming = _by_outputs(incoming)
        outputs = incoming.shape[1]
        if keep == 0:
            return np.zeros((n_groups, inputs, per_group, taps), np.float32)
        group = np.arange(outputs) // per_group
        groups = range(n_groups)
        paths = np.stack([incoming[:, group == g].mean((1, 2)) for g in groups])
        paths = np.where(paths > _ROUNDING * paths.max(), paths, 0) if paths.any() else paths + 1
        # Rounded, so that counts that differ by rounding errors alone are equal on any machine.
        mantissas, exponents = np.frexp(paths)
        paths = np.ldexp(np.round(mantissas * 2**16) / 2**16, exponents)
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
        mask = _placed(counts, incoming, rng).reshape(inputs, n_groups, per_group, taps)
        return mask.swapaxes(0, 1)


def _by_outputs(array: np.ndarray) -> np.ndarray:
    """An array (..., groups, inputs, outputs, taps) with the outputs of all groups in one axis."""
    array = array.swapaxes(-4, -3)
    return array.reshape(*array.shape[:-3], -1, array.shape[-1])


class _Choice:
    """Chooses each layer's mask when an evaluation of the network first meets its kernel.

    The paths that arrive there have passed the masks chosen before, so one evaluation serves all
    layers. It is not compiled, because each choice is made on the host.
    """

    def __init__(
        self,
        method: NPB,
        net: Network,
        keep: list[np.ndarray],
        rng: np.random.Generator,
        report: Report,
    ):
        self.method, self.net, self.rng, self.report = method, net, rng, report
        sizes = [layer.size // layer.copies for layer in net.layers for _ in range(layer.copies)]
        copies = [layer.copies for layer in net.layers]
        # A slot is one copy of a layer, a range of the row of all weights.
        self.ends = np.cumsum(sizes)
        self.slots = [(i, copy) for i, n in enumerate(copies) for copy in range(n)]
        self.keep = np.concatenate(
            [np.broadcast_to(np.ravel(k), n) for k, n in zip(keep, copies, strict=True)]
        )
        self.kept = np.ones(net.size, np.float32)
        self.entering = np.zeros(net.size, np.float32)
        # Views of the two rows, one pair for each layer.
        self.kernels = list(zip(*map(net.unravel, (self.kept, self.entering)), strict=True))
        self.waiting = dict.fromkeys(range(len(sizes)))

    def masks(self) -> list[np.ndarray]:
        """The layers' masks in float32."""
        net = self.net.unrolled()
        numbers, _ = numbered_weights(net, lambda use: use.weight.array)
        self.numbers = iter(numbers)
        # Written by NumPy: JAX would compile a program for each shape.
        ones = [jnp.asarray(np.ones(layer.shape, np.float32)) for layer in net.layers]
        net.evaluate(ones, Interpreter(net.gates, at_kernel=self._at_kernel))
        self._choose(list(self.waiting))
        return self.net.unravel(self.kept)

    def _at_kernel(self, use: KernelUse) -> Spread:
        numbers = next(self.numbers)
        if isinstance(use.flow.mantissa, jax.core.Tracer):  # within a loop
            return use.count()
        here = np.searchsorted(self.ends, np.unique(numbers[numbers >= 0]), side="right")
        new = [slot for slot in dict.fromkeys(here.tolist()) if slot in self.waiting]
        if new:
            self.entering[numbers[numbers >= 0]] = _entering(use)[numbers >= 0]
            self._choose(new)
        chosen = np.where(numbers >= 0, self.kept[numbers], use.weight.array)
        return use.contract(use.flow.spread, Spread(jnp.asarray(chosen), use.weight.shape))

    def _choose(self, slots: list[int]) -> None:
        """Chooses the masks of some slots from the paths that enter at each weight."""
        for slot in slots:
            i, copy = self.slots[slot]
            layer, (kept, entering) = self.net.layers[i], self.kernels[i]
            incoming = layer.by_features(entering)[copy]
            chosen = np.array(layer.by_features(kept))
            chosen[copy] = mask = self.method.solve(incoming, int(self.keep[slot]), self.rng)
            kept[...] = layer.as_kernel(chosen)
            del self.waiting[slot]
            kernels = np.any(mask, 3)
            numbers = {"nodes": int(np.any(kernels, 1).sum()), "kernels": int(kernels.sum())}
            self.report(len(self.slots) - len(self.waiting), len(self.slots), numbers)


def _entering(use: KernelUse) -> np.ndarray:
    """The number of paths that enter at each weight, kept or not, divided by the largest."""

    def paths(weight: Array) -> Array:
        return jnp.sum(use.contract(use.flow.spread, Spread(weight, use.weight.shape)).array)

    entering = np.asarray(jax.grad(paths)(use.weight.array))
    largest = entering.max(initial=0.0)
    return entering / (largest if largest > 0 else np.float32(1))


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

    The objective treats all output features of a group alike, so only the number of weights of each
    input feature matters. Its first weight is worth a node, each of its first `width` weights is
    worth a kernel, and each weight is worth its paths. Each output feature is worth a node, up to
    the number of kernels of live input features, since these can always be placed so that they miss
    no output. This program has three variables for each input feature instead of one for each
    kernel, and the same optimum. Its constraints are sums over nested sets, so all vertices of its
    linear relaxation are integral. The simplex method ends at a vertex, so it needs no branching.

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
    from scipy import optimize, sparse  # heavy, and needed here alone

    groups, inputs = paths.shape
    kernels = inputs * widths.sum()
    # Each term is divided by its maximum, and all are multiplied by the number of weights, so that
    # the solver's tolerances are small compared with the value of one weight.
    size = kernels * taps
    node = alpha * size / (paths.size + widths.sum())
    path = (1 - alpha) * size / (taps * np.sum(paths * widths[:, None]) or 1.0)
    order = rng.permuted(np.broadcast_to(np.arange(inputs), paths.shape), axis=1)
    paths = np.take_along_axis(paths, order, 1)
    width = np.broadcast_to(widths[:, None], paths.shape).ravel()
    alive, gain = (paths > 0).ravel(), path * paths.ravel()

    # Variables: for each input feature its first weight, the others that start a kernel, and all
    # further ones; for each group the output features that are reached.
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
    """Spreads the weights of each input feature, `row`, over its kernels; returns (inputs, width).

    Input features take turns, those with the most paths first. Each takes the output features with
    the fewest paths so far, so none is missed as long as there are enough weights.
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
    """A mask (inputs, outputs, taps) with a given number of weights at random in each kernel."""
    # Taps that read nothing but padding come last.
    order = np.argsort(rng.random(incoming.shape) + (incoming <= 0), axis=2)
    mask = np.zeros(incoming.shape, np.float32)
    np.put_along_axis(mask, order, np.arange(incoming.shape[2]) < counts[..., None], 2)
    return mask


def _moved(net: Network, masks: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """The masks with weights moved from places on no path to places on one, if there are any."""
    moves = 1
    while moves:
        moves = 0
        effective = [m.astype(bool) & r for m, r in zip(masks, _reached(net, masks), strict=True)]
        # A place must not depend on a weight that will be moved.
        places = _reached(net, effective)
        for i, layer in enumerate(net.layers):
            kept = np.array(layer.by_features(masks[i]))
            views = (kept, layer.by_features(effective[i]), layer.by_features(places[i]))
            for copy, (mask, live, place) in enumerate(zip(*map(_by_outputs, views), strict=True)):
                moves += _move(mask, live, place, rng)
                inputs, groups = kept.shape[2], kept.shape[1]
                mask = mask.reshape(inputs, groups, -1, mask.shape[2])
                kept[copy] = mask.swapaxes(0, 1)
            masks = [*masks[:i], layer.as_kernel(kept), *masks[i + 1 :]]
    return masks


def _reached(net: Network, masks: list[np.ndarray]) -> list[np.ndarray]:
    return [on_host(r) for r in reached(net, [m.astype(bool) for m in masks])]


def _move(
    kept: np.ndarray, effective: np.ndarray, reached: np.ndarray, rng: np.random.Generator
) -> int:
    """Moves the dead weights of one mask (inputs, outputs, taps) in place; returns how many."""
    dead, free = np.argwhere((kept > 0) & ~effective), np.argwhere((kept == 0) & reached)
    of_kernel, of_input = effective.sum(2), effective.sum((1, 2))
    # One of several equal kernels is filled before the next.
    chance = rng.random(of_kernel.shape)
    i, j, _ = free.T
    order = np.lexsort((chance[i, j], -of_input[i], -of_kernel[i, j]))
    moves = min(len(dead), len(free))
    kept[tuple(rng.permutation(dead)[:moves].T)] = 0
    kept[tuple(free[order[:moves]].T)] = 1
    return moves

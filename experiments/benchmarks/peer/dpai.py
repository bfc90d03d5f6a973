"""Algorithm 1 of DPaI in PyTorch: an all-ones forward pass at full resolution, a sort, Adam."""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn


def erk(shapes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """Returns how many weights each layer keeps by the Erdős-Rényi-kernel rule (Evci et al. 2020).

    A layer's density is proportional to the sum over the product of its kernel's sizes, at most 1.

    Args:
        shapes: Shapes of the kernels.
        sparsity: Fraction of all weights to remove.

    Raises:
        ValueError: The sparsity is outside [0, 1), or a layer would keep no weight.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    sizes, shares = [math.prod(shape) for shape in shapes], [sum(shape) for shape in shapes]
    total = left = round((1 - Fraction(str(sparsity))) * sum(sizes))
    rest = list(range(len(sizes)))
    # A layer that would be more than full keeps all its weights, which leaves less for the others.
    while over := {i for i in rest if left * shares[i] > sizes[i] * sum(shares[j] for j in rest)}:
        left -= sum(sizes[i] for i in over)
        rest = [i for i in rest if i not in over]
    scale = Fraction(left, sum(shares[i] for i in rest))
    ideal = [
        scale * share if i in rest else size
        for i, (share, size) in enumerate(zip(shares, sizes, strict=True))
    ]
    keep = [math.floor(number) for number in ideal]
    by_remainder = sorted(range(len(keep)), key=lambda i: keep[i] - ideal[i])
    for i in by_remainder[: total - sum(keep)]:
        keep[i] += 1
    if min(keep) < 1:
        raise ValueError(f"sparsity {sparsity} leaves a layer without a weight")
    return keep


class GlobalSum(nn.Module):
    """Adds up all positions of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, channels, 1, 1)."""
        return x.sum((2, 3), keepdim=True)


def linearize(module: nn.Module) -> None:
    """Turns a network, in place, into one that counts paths once its parameters are masks.

    Only the kernels are left as parameters. Normalization and activations become the identity, as
    counts are not negative, and biases are removed. Pooling becomes a sum over its window, so that
    counts are integers, without the constant factor of an average.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d | nn.ReLU):
            setattr(module, name, nn.Identity())
        elif isinstance(child, nn.MaxPool2d):
            setattr(module, name, nn.AvgPool2d(child.kernel_size, divisor_override=1))
        elif isinstance(child, nn.AdaptiveAvgPool2d):
            setattr(module, name, GlobalSum())
        elif isinstance(child, nn.Linear):
            child.register_parameter("bias", None)
        linearize(child)


def log_paths(network: nn.Sequential, ones: Tensor) -> Tensor:
    """Returns log R_P, the logarithm of the number of effective paths.

    After each layer (a residual block counts as one) counts are divided by their maximum, so that
    the 10^41 and more paths of VGG-19 do not overflow float32. The divisor is a constant for
    autograd, and a block's branch and shortcut share it, so the gradient of log R_P is exact.

    Args:
        network: A network as `linearize` leaves it, its weights the masks.
        ones: All-ones input (1, channels, height, width).

    Raises:
        RuntimeError: No path reaches the output.
    """
    x, log_scale = ones, 0.0
    for layer in network:
        if isinstance(layer, nn.Identity):
            continue
        x = layer(x)
        scale = x.detach().amax().item()
        if scale == 0.0:
            raise RuntimeError("no path is left; choose a lower sparsity or another seed")
        x = x / scale
        log_scale += math.log(scale)
    return x.sum().log() + log_scale


class DPaI:
    """Algorithm 1 of DPaI (Xiang et al., ICLR 2025) on all positions of the feature maps.

    Attributes:
        masks: The masks by name, the parameters of the linearized network.
        scores: Their scores by name, drawn from N(0, 1).
        keep: Number of weights that each mask keeps.
    """

    def __init__(self, network: nn.Sequential, size: int, sparsity: float) -> None:
        linearize(network)
        self.network, self.masks = network, dict(network.named_parameters())
        self.keep = erk([mask.shape for mask in self.masks.values()], sparsity)
        self.scores = {name: torch.randn_like(mask) for name, mask in self.masks.items()}
        self.optimizer = torch.optim.Adam(self.scores.values(), 0.005, maximize=True, fused=True)
        self.ones = torch.ones(1, 3, size, size, dtype=next(network.parameters()).dtype)

    def step(self) -> None:
        """Takes one step: lines 5 to 8 of the algorithm, with Adam."""
        _, gradients = self.differentiate()
        with torch.no_grad():
            for (name, mask), gradient in zip(self.masks.items(), gradients, strict=True):
                score = self.scores[name]
                score.grad = direction(mask, gradient, score)
        self.optimizer.step()

    def measure(self) -> dict[str, float | int]:
        """Returns log R_P and the numbers of effective nodes and kernels at the scores' masks."""
        value, gradients = self.differentiate()
        pairs = zip(self.masks.values(), gradients, strict=True)
        shares = [node_and_kernel(mask, gradient) for mask, gradient in pairs]
        return {
            "log_paths": value,
            "nodes": sum(int((node > 0).sum()) for node, _ in shares),
            "kernels": sum(int((kernel > 0).sum()) for _, kernel in shares),
        }

    def differentiate(self) -> tuple[float, tuple[Tensor, ...]]:
        """Sets the masks by their scores; returns log R_P and its gradients by the masks."""
        for (name, mask), k in zip(self.masks.items(), self.keep, strict=True):
            set_to_top_k(mask, self.scores[name], k)
        value = log_paths(self.network, self.ones)
        return value.item(), torch.autograd.grad(value, list(self.masks.values()))


def set_to_top_k(mask: Tensor, score: Tensor, k: int) -> None:
    """Writes 1 where |score| is among the k largest of the layer and 0 elsewhere, by a sort."""
    with torch.no_grad():
        order = torch.sort(score.abs().flatten(), descending=True).indices
        mask.zero_().view(-1)[order[:k]] = 1.0


def node_and_kernel(mask: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the share of all paths that pass each node and each kernel of a layer.

    Both have the mask's axes (outputs, inputs, taps), with size 1 where summed over.
    """
    passing = mask.detach() * gradient
    kernel = passing.sum((2, 3), keepdim=True) if passing.dim() == 4 else passing
    return kernel.sum(1, keepdim=True), kernel


def direction(
    mask: Tensor, gradient: Tensor, score: Tensor, alpha: float = 0.99, beta: float = 0.5
) -> Tensor:
    """Returns (1 − α)·g + α·((1 − β)·g·[node ineffective] + β·g·[kernel ineffective]).

    g is the gradient ∂ log R_P/∂m · sign(s), straight through the choice of the top k.
    """
    node, kernel = node_and_kernel(mask, gradient)
    push = (1 - beta) * (node == 0) + beta * (kernel == 0)
    return ((1 - alpha) + alpha * push) * gradient * score.sign()

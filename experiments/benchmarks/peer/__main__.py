"""The commands of `python -m experiments.benchmarks.peer`."""

import argparse
import json
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.benchmarks.peer.dpai import DPaI
from experiments.benchmarks.peer.networks import NETWORKS


def prune(args: argparse.Namespace) -> dict[str, Any]:
    """Times steps of pruning; also measures the pruned network."""
    algorithm = DPaI(NETWORKS[args.network](), args.size, args.sparsity)
    seconds = timed(algorithm.step, args.steps, args.warmup)
    peak = peak_bytes()
    weights = sum(mask.numel() for mask in algorithm.masks.values())
    return {"seconds": seconds, "peak_bytes": peak, "weights": weights} | algorithm.measure()


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Times steps of training on random images, in the given memory format."""
    layout = getattr(torch, args.memory_format)
    network = NETWORKS[args.network]().to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(args.batch, 3, args.size, args.size).to(memory_format=layout)
    labels = torch.randint(network[-1].out_features, (args.batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return {"seconds": timed(step, args.steps, args.warmup), "peak_bytes": peak_bytes()}


def timed(step: Callable[[], None], steps: int, warmup: int) -> dict[str, float]:
    """Calls a step repeatedly; returns the seconds of one, without the warm-up."""
    seconds = []
    for _ in range(warmup + steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    kept = seconds[warmup:]
    return {"median": statistics.median(kept), "min": min(kept), "max": max(kept)}


def peak_bytes() -> int:
    """Returns the peak memory of this process so far."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # On Linux getrusage's number is inherited from the parent process, which may be large.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def parse() -> argparse.Namespace:
    """Reads the command line."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--network", choices=NETWORKS, default="resnet20")
    common.add_argument("--size", type=int, default=32, help="pixels of an image along each axis")
    common.add_argument("--steps", type=int, default=10, help="steps that are timed")
    common.add_argument("--warmup", type=int, default=2, help="steps before them")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--threads", type=int, default=2)
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.peer",
        description="Time PyTorch; print one line of JSON.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prune", parents=[common], help="time steps of DPaI")
    command.add_argument("--sparsity", type=float, default=0.9)
    command.set_defaults(run=prune)
    command = commands.add_parser("train", parents=[common], help="time steps of SGD")
    command.add_argument("--batch", type=int, default=128, help="images of a step")
    formats = ("contiguous_format", "channels_last")
    command.add_argument("--memory-format", choices=formats, default=formats[0])
    command.set_defaults(run=train)
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1; got {args.steps}")
    return args


def main() -> None:
    """Runs one command and prints its result."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    facts = {"torch": torch.__version__, "baseline_bytes": peak_bytes()}
    print(json.dumps(settings | facts | args.run(args)))


if __name__ == "__main__":
    main()

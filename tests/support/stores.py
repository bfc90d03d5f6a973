"""Made-up records of jobs, whose means and differences are known."""

import numpy as np

from experiments.config import Config

SPARSITIES = (0.6838, 0.9, 0.9684, 0.99, 0.9968)
METHODS = ("random", "snip", "synflow", "phew", "npb", "dpai-published", "dpai")
RECIPES = (
    {"dataset": "cifar10", "model": "resnet20", "epochs": 160},
    {"dataset": "cifar100", "model": "vgg19", "epochs": 100},
)
SEEDS = 3
MISSING = ("phew", 0.99, 2)
"""In the first recipe there is no such job."""
DIVERGED = ("snip", 0.9968, 1)
"""In the first recipe this job ended without an accuracy."""
LAYERS = 12


def mean_accuracy(recipe, method, sparsity):
    """Falls with the sparsity, the faster the earlier a method stands in METHODS."""
    if method == "dense":
        return 0.92 - 0.2 * recipe
    place = METHODS.index(method)
    return 0.92 - 0.2 * recipe - (0.02 + 0.006 * (7 - place)) * (-np.log10(1 - sparsity)) ** 1.8


def record(config, accuracy, *, best=None, seconds=1.0, shift=0.0, error=None):
    """One record as a job writes it."""
    kept = 1.0 - config.sparsity
    layers = []
    for index in range(LAYERS):
        outputs = 16 * 2 ** (index // 4)
        weights = int(9 * outputs * outputs * kept) + 1
        width = 1 - 0.35 * config.sparsity * (0.3 + shift) * (1 + np.sin(index))
        layers.append(
            {
                "name": f"layer{index}",
                "size": 9 * outputs * outputs,
                "weights": weights,
                "effective": int(weights * width),
                "nodes": int(outputs * width),
                "kernels": int(weights * width / (1 + 8 * kept)) + 1,
                "outputs": outputs,
            }
        )
    totals = {
        name: sum(layer[name] for layer in layers)
        for name in ("weights", "effective", "nodes", "kernels")
    }
    log_paths = 100 + 40 * np.log10(kept) + 10 * shift
    origin = {"commit": "0123456789abcdef", "versions": {"python": "3.11", "jax": "0.10.2"}}
    origin |= {"hardware": {"cpu": "a <chip>", "cpu_count": 2}, "code": "c0de"}
    said = {"config": config.as_dict(), "method": {"type": config.method}}
    if error is not None:
        return said | origin | {"error": error}
    metrics = {
        "test_accuracy": accuracy,
        "best_test_accuracy": best,
        "diverged": 7 if accuracy is None else None,
        "prune_seconds": seconds,
        "topology": totals | {"log_paths": log_paths, "layers": layers},
    }
    return said | {"metrics": metrics} | origin


def sweep(seed=0):
    """All methods at all sparsities under two recipes, but for what is missing and diverged.

    Of the first job an older record stands before, with another accuracy; a failed job and a
    benchmark stand last.
    """
    rng = np.random.default_rng(seed)
    records = []
    for number, recipe in enumerate(RECIPES):
        for run in range(SEEDS):
            of_seed = rng.normal(0, 0.004)  # what the jobs of one seed share
            for method, sparsity in [
                ("dense", 0.0),
                *((m, s) for s in SPARSITIES for m in METHODS),
            ]:
                job = (method, sparsity, run)
                if number == 0 and job == MISSING:
                    continue
                mean = mean_accuracy(number, method, sparsity)
                accuracy = float(mean + of_seed + rng.normal(0, 0.003))
                if number == 0 and job == DIVERGED:
                    accuracy = None
                best = None if accuracy is None else accuracy - 0.002
                config = Config(**recipe, method=method, sparsity=sparsity, seed=run)
                shift = (
                    0.0 if method == "dense" else METHODS.index(method) / 7 + rng.normal(0, 0.03)
                )
                seconds = float(rng.uniform(1, 2))
                records.append(record(config, accuracy, best=best, seconds=seconds, shift=shift))
    first = Config.of(records[0]["config"])
    failed = Config(**RECIPES[0], method="grasp", sparsity=0.9)
    return [
        record(first, 0.1, best=0.1),
        *records,
        record(failed, None, error="out of <memory>"),
        {"table": "step", "title": "a benchmark"},
    ]

"""Pruning at initialization for JAX.

One call turns a network function, its parameters and a sparsity into masks:

>>> import jax, jax.numpy as jnp, dpai_jax as dpai
>>> fn = lambda params, x: jax.nn.relu(x @ params["hidden"]) @ params["out"]
>>> params = {"hidden": jnp.ones((16, 32)), "out": jnp.ones((32, 4))}
>>> result = dpai.prune(fn, params, jnp.ones((1, 16)), sparsity=0.9, key=jax.random.key(0))
>>> result.topology.weights
64
"""

from dpai_jax import plot
from dpai_jax.allocation import Allocation, er, erk, global_threshold, uniform, weights_to_keep
from dpai_jax.caching import cache
from dpai_jax.compacting import Compact, compact
from dpai_jax.counts import log_paths
from dpai_jax.files import load, save
from dpai_jax.flax_nnx import from_nnx
from dpai_jax.fronts import pareto
from dpai_jax.many import prune_many
from dpai_jax.masks import apply_masks, binarize, shuffled
from dpai_jax.measuring import LayerTopology, Topology, effective_weights, topology
from dpai_jax.methods import (
    FORCE,
    IMP,
    NPB,
    NTKSAP,
    PHEW,
    SNIP,
    DPaI,
    GraSP,
    IterativeSNIP,
    Magnitude,
    Method,
    Problem,
    ProsPr,
    Pruned,
    Random,
    SynFlow,
    ascent,
)
from dpai_jax.optimizer import keep_pruned
from dpai_jax.paths import Layer, Network, register_rule, trace
from dpai_jax.pruning import Result, prune
from dpai_jax.repairing import repair
from dpai_jax.summaries import Summary

__all__ = [
    "FORCE",
    "IMP",
    "NPB",
    "NTKSAP",
    "PHEW",
    "SNIP",
    "Allocation",
    "Compact",
    "DPaI",
    "GraSP",
    "IterativeSNIP",
    "Layer",
    "LayerTopology",
    "Magnitude",
    "Method",
    "Network",
    "Problem",
    "ProsPr",
    "Pruned",
    "Random",
    "Result",
    "Summary",
    "SynFlow",
    "Topology",
    "apply_masks",
    "ascent",
    "binarize",
    "cache",
    "compact",
    "effective_weights",
    "er",
    "erk",
    "from_nnx",
    "global_threshold",
    "keep_pruned",
    "load",
    "log_paths",
    "pareto",
    "plot",
    "prune",
    "prune_many",
    "register_rule",
    "repair",
    "save",
    "shuffled",
    "topology",
    "trace",
    "uniform",
    "weights_to_keep",
]

"""Pruning methods, one file each."""

from dpai_jax.methods.balance import ascent
from dpai_jax.methods.base import Method, Problem, Pruned
from dpai_jax.methods.dpai import DPaI
from dpai_jax.methods.force import FORCE
from dpai_jax.methods.grasp import GraSP
from dpai_jax.methods.imp import IMP
from dpai_jax.methods.magnitude import Magnitude
from dpai_jax.methods.npb import NPB
from dpai_jax.methods.ntksap import NTKSAP
from dpai_jax.methods.phew import PHEW
from dpai_jax.methods.prospr import ProsPr
from dpai_jax.methods.random import Random
from dpai_jax.methods.snip import SNIP, IterativeSNIP
from dpai_jax.methods.synflow import SynFlow

__all__ = [
    "FORCE",
    "IMP",
    "NPB",
    "NTKSAP",
    "PHEW",
    "SNIP",
    "DPaI",
    "GraSP",
    "IterativeSNIP",
    "Magnitude",
    "Method",
    "Problem",
    "ProsPr",
    "Pruned",
    "Random",
    "SynFlow",
    "ascent",
]

"""Experiments on dpai_jax: data sets, networks, training, results and reports.

Run `python -m experiments --help` for the commands.
"""

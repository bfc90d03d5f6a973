"""Measurements of time and memory, and the peers that dpai_jax is measured against."""

"""The PyTorch peer: plain networks, and Algorithm 1 of DPaI written plainly from its paper.

It needs PyTorch and nothing else (`pip install torch`), best in an environment of its own, and runs
in a process of its own, so that it shares neither threads nor memory with JAX. In the project's
folder,

    python -m experiments.benchmarks.peer prune --network resnet20 --size 32 --sparsity 0.9
    python -m experiments.benchmarks.peer train --network resnet20 --size 32 --batch 128

each print one line of JSON: what was asked for, the seconds of a step, and the largest amount of
memory that the process has held, before (`baseline_bytes`) and after (`peak_bytes`).
"""

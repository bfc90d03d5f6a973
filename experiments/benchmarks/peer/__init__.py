"""The PyTorch peer: plain networks, and Algorithm 1 of DPaI written plainly from its paper.

It needs only PyTorch (`pip install torch`), best in a separate environment. It runs in a separate
process, so that it shares neither threads nor memory with JAX. In the project's folder,

    python -m experiments.benchmarks.peer prune --network resnet20 --size 32 --sparsity 0.9
    python -m experiments.benchmarks.peer train --network resnet20 --size 32 --batch 128

each print one line of JSON: the settings, the seconds of a step, and the peak memory of the process
before (`baseline_bytes`) and after (`peak_bytes`).
"""

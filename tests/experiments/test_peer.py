"""The PyTorch peer is right: it counts, allocates and ascends as dpai_jax does on its networks."""

import ast
import functools
import itertools
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dpai_jax as dpai

torch = pytest.importorskip("torch")

from experiments.benchmarks.peer import dpai as peer  # noqa: E402
from experiments.benchmarks.peer import networks  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]

conv = functools.partial(
    jax.lax.conv_general_dilated, dimension_numbers=("NCHW", "OIHW", "NCHW"), padding="SAME"
)


def norm(x):
    return 0.5 * x + 0.1


def strided(x, kernel, stride):
    """PyTorch pads both sides alike, unlike SAME where the stride is two."""
    border = (kernel.shape[-1] // 2,) * 2
    return conv(x, kernel, (stride, stride), padding=(border, border))


def head(x, kernel):
    return x.mean((2, 3)) @ kernel.T


def resnet_in_jax(params, x):
    """The peer's residual networks, whose layers are numbered: 0 the stem, from 3 on the blocks."""
    x = jax.nn.relu(norm(conv(x, params["0.weight"], (1, 1))))
    for block in itertools.count(3):
        if f"{block}.conv1.weight" not in params:
            # After the last block come the average and the flattening.
            return head(x, params[f"{block + 2}.weight"])
        first, second = (params[f"{block}.conv{i}.weight"] for i in (1, 2))
        stride = 2 if len(first) > x.shape[1] else 1
        y = jax.nn.relu(norm(strided(x, first, stride)))
        y = norm(conv(y, second, (1, 1)))
        if stride == 2:
            x = norm(strided(x, params[f"{block}.shortcut.0.weight"], stride))
        x = jax.nn.relu(x + y)
    raise AssertionError


def vgg_in_jax(params, x):
    """The peer's VGG networks: three layers for each convolution, one for a pooling."""
    *kernels, (_, last) = sorted((int(name.partition(".")[0]), name) for name in params)
    due = 0
    for place, name in kernels:
        if place > due:
            window = (1, 1, 2, 2)
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
        x = jax.nn.relu(norm(conv(x, params[name], (1, 1))))
        due = place + 3
    return head(x, params[last])


def in_jax(name):
    return vgg_in_jax if name.startswith("vgg") else resnet_in_jax


SMALL = {
    "resnet": lambda: networks.resnet((1, 1), width=8, num_classes=3),
    "vgg": lambda: networks.vgg((1, 2), width=8, num_classes=3),
}


def algorithm(name, dtype):
    torch.manual_seed(0)
    return peer.DPaI(SMALL[name]().to(dtype), 8, sparsity=0.97)


@functools.lru_cache
def traced(name):
    params = as_jax(algorithm(name, torch.float32).masks)
    return dpai.trace(in_jax(name), params, jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32))


def as_jax(tensors):
    # Copied, for both may stand in the same memory, where PyTorch writes.
    return {
        name: jnp.array(tensor.detach().numpy(), jnp.float32) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_paths_nodes_and_kernels_are_the_library_s(name, dtype):
    ours = algorithm(name, dtype)
    measured = ours.measure()
    masks = {name: mask > 0 for name, mask in as_jax(ours.masks).items()}
    topology = dpai.topology(traced(name), masks)
    # To the last factor, for the peer's pooling adds up what it pools.
    assert measured["log_paths"] == pytest.approx(topology.log_paths, abs=1e-5)
    assert (measured["nodes"], measured["kernels"]) == (topology.nodes, topology.kernels)
    # Some of either have died, so that the numbers say something.
    assert topology.effective < topology.weights == sum(ours.keep)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_is_adam_in_the_library_s_direction(name):
    ours = algorithm(name, torch.float32)
    keep = dict(zip(ours.masks, ours.keep, strict=True))
    settings = {"alpha": 0.99, "beta": 0.5, "counting": "exact"}
    ascent = jax.jit(functools.partial(dpai.ascent, traced(name), **settings))
    first, second = (dict.fromkeys(ours.masks, 0.0) for _ in range(2))
    for t in range(1, 4):
        before = as_jax(ours.scores)
        ours.step()
        after = as_jax(ours.scores)
        for name, direction in ascent(before, keep).items():
            d = np.asarray(direction)
            np.testing.assert_allclose(ours.scores[name].grad, d, rtol=1e-4, atol=1e-7)
            first[name] = 0.9 * first[name] + 0.1 * d
            second[name] = 0.999 * second[name] + 0.001 * d**2
            deviation = np.sqrt(second[name] / (1 - 0.999**t))
            step = 0.005 * first[name] / (1 - 0.9**t) / (deviation + 1e-8)
            np.testing.assert_allclose(after[name], before[name] + step, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "published", "layers"),
    [("resnet20", 270_896, 22), ("resnet18", 11_261_632, 21), ("vgg19", 20_070_080, 17)],
)
def test_the_networks_have_the_published_number_of_weights_and_erk_s_shares(
    name, published, layers
):
    with torch.device("meta"):
        network = networks.NETWORKS[name]()
    peer.linearize(network)
    shapes = {name: tuple(mask.shape) for name, mask in network.named_parameters()}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((1, 3, 32, 32), jnp.float32)
    net = dpai.trace(in_jax(name), params, x)
    assert (net.size, len(net.layers)) == (published, layers)
    for sparsity in (0.0, 0.6838, 0.9, 0.9684, 0.99, 0.9968):
        keep = peer.erk(list(shapes.values()), sparsity)
        assert sum(keep) == round(published * (10_000 - round(10_000 * sparsity)) / 10_000)
        assert dict(zip(shapes, keep, strict=True)) == dpai.erk(net, sparsity)


def test_a_sparsity_that_leaves_too_little_is_refused():
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\), got 1"):
        peer.erk([(3, 3)], 1.0)
    with pytest.raises(ValueError, match=r"sparsity 0\.9 leaves a layer without a weight"):
        peer.erk([(2, 2), (2, 2)], 0.9)


def test_no_path_left_is_said():
    network = SMALL["vgg"]()
    peer.linearize(network)
    with torch.no_grad():
        network[0].weight.zero_()
    with pytest.raises(RuntimeError, match="no path is left"):
        peer.log_paths(network, torch.ones(1, 3, 8, 8))


def test_no_count_of_vgg19_overflows():
    network = networks.NETWORKS["vgg19"]()
    peer.linearize(network)
    ones = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        for mask in network.parameters():
            mask.fill_(1.0)
        ours = peer.log_paths(network, ones).item()
        count = network.double()(ones.double()).sum()
    assert count > torch.finfo(torch.float32).max
    assert ours == pytest.approx(count.log().item(), rel=1e-6)


def test_the_peer_imports_torch_and_the_standard_library_alone():
    allowed = {"torch", *sys.stdlib_module_names}
    for path in (ROOT / "experiments/benchmarks/peer").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name.startswith("experiments.benchmarks.peer.")
                assert own or name.partition(".")[0] in allowed


@pytest.mark.parametrize("command", ["prune --sparsity 0.9", "train --batch 4"])
def test_a_command_prints_one_line_of_json(command):
    arguments = f"{command} --size 8 --steps 3 --warmup 1 --threads 1".split()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.peer", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert 0 < result["seconds"]["min"] <= result["seconds"]["median"] <= result["seconds"]["max"]
    assert 0 < result["baseline_bytes"] <= result["peak_bytes"]
    assert (result["network"], result["threads"]) == ("resnet20", 1)
    assert result["torch"] == torch.__version__
    if result["command"] == "prune":
        assert result["weights"] == 270_896
        assert 0 < result["nodes"] < result["kernels"] < 27_090
        assert result["log_paths"] > 0

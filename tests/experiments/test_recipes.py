import dataclasses
import re
import subprocess
import sys

import pytest

from experiments import methods, models, recipes, sweep
from experiments.config import OPTIMIZERS, ConfigError
from experiments.recipes import paper
from experiments.sweep import Sweep
from tests.support import abstract

SIDES = {"cifar10": 32, "cifar100": 32, "tiny_imagenet": 64, "imagenet": 224, "digits": 16}
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet": 1000, "digits": 10}
FASHION = "idx:/usr/share/datasets/fashion-mnist"
SIDES |= {FASHION: 28}
CLASSES |= {FASHION: 10}
every_sweep = pytest.mark.parametrize(
    ("name", "scale"), [(n, s) for n in recipes.RECIPES for s in ("full", "small")]
)


@every_sweep
def test_every_job_of_a_recipe_can_be_run(name, scale):
    """Its values make sense, its methods exist, and its network takes its images."""
    configs = sweep.configs([name], scale)
    for config in configs:
        config.check()
        methods.find(config.method)
        methods.check_granularity(config)
    recipe = ("model", "dataset", "width", "image_size")
    for network, dataset, width, size in {tuple(getattr(c, n) for n in recipe) for c in configs}:
        model = models.create(network, CLASSES[dataset], width, None, size)
        side = SIDES[dataset]
        channels = 1 if dataset in ("digits", FASHION) else 3
        assert abstract.shapes(model, abstract.images(1, side, side, channels))


@every_sweep
def test_a_docstring_says_the_command_and_the_number_of_jobs(name, scale):
    recipe = recipes.find(name)
    assert f"\n    python -m experiments sweep {name} --scale {scale}\n" in recipe.__doc__
    (jobs,) = re.findall(rf"{scale.capitalize()}: (\d+) jobs", recipe.__doc__)
    assert int(jobs) == len(sweep.configs([name], scale))


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_small_is_less_of_the_same(name):
    full, small = (sweep.configs([name], scale) for scale in ("full", "small"))
    if {config.seed for config in small} == {0}:  # fewer seeds of the same jobs
        assert set(small) == {config for config in full if config.seed == 0}
    else:
        _is_smaller(*(recipes.find(name).sweep(scale) for scale in ("full", "small")))


def _is_smaller(full, small):
    kept = ("model", "augmentation", "optimizer", "learning_rate", "momentum", "weight_decay")
    assert [getattr(full.base, n) for n in kept] == [getattr(small.base, n) for n in kept]
    assert len(small.base.drops) == len(full.base.drops)
    assert small.base.epochs < full.base.epochs
    assert small.seeds == full.seeds == 3
    assert set(small.methods) <= set(full.methods)
    assert set(small.sparsities) <= set(full.sparsities)


def test_the_papers_sparsities_are_powers_of_ten():
    powers = [1 - 10**-c for c in (0.5, 1.0, 1.5, 2.0, 2.5)]
    assert [round(power, 4) for power in powers] == list(paper.SPARSITIES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20_cifar10", ("cifar10", 160, (80, 120), 0.1, 1e-4, 128)),
        ("vgg19_cifar100", ("cifar100", 160, (60, 120), 0.1, 1e-4, 128)),
        ("resnet18_tiny_imagenet", ("tiny_imagenet", 100, (30, 60, 80), 0.01, 1e-4, 128)),
    ],
)
def test_the_three_networks_are_trained_by_the_published_settings(name, expected):
    base = recipes.find(name).sweep("full").base
    found = (base.dataset, base.epochs, base.drops)
    assert (*found, base.learning_rate, base.weight_decay, base.batch_size) == expected
    assert (base.optimizer, base.momentum, base.warmup) == (OPTIMIZERS[0], 0.9, 0.0)


def test_no_two_ablations_are_the_same_method():
    names = recipes.find("ablations").METHODS
    found = [methods.find(name).method for name in names]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])
    changed = {
        field.name
        for method in found
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != getattr(found[0], field.name)
    }
    assert changed == {"allocation", "alpha", "beta"}


def test_a_file_of_ones_own_is_a_recipe(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from experiments.config import Config\n"
        "from experiments.sweep import Sweep\n"
        "def sweep(scale='full'):\n"
        "    base = Config(model='mlp')\n"
        "    return [Sweep(base, [m], [0.5], seeds=1) for m in ('snip', 'dpai[beta=0]')]\n"
    )
    first, second = recipes.find(str(file)).sweep("small")
    assert isinstance(first, Sweep)
    assert [config.method for config in second.configs()] == ["dense", "dpai[beta=0]"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet20_cifar100", r"recipe must be one of \('resnet20_cifar10', .*; got 'resnet20_c"),
        ("none.py", r"recipe must be one of .*; got 'none\.py'"),
        ("empty.py", r"must define a function sweep\(scale\)\.$"),
        ("broken.py", r"recipe .*broken\.py can't be read: .*never closed"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").touch()
    (tmp_path / "broken.py").write_text("def sweep(scale:\n")
    with pytest.raises(ConfigError, match=message):
        recipes.find(name)


def test_recipes_are_found_without_importing_jax():
    code = (
        "import sys; from experiments import recipes\n"
        "from experiments.sweep import configs\n"
        "configs(recipes.RECIPES, 'small')\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"

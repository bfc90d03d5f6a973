"""Recipes by name: what to train, and which methods and sparsities to compare.

A recipe is a Python module with a function `sweep(scale)` that returns one or several `Sweep`s, at
the scale "full" or "small". Any Python file with such a function is a recipe, too.
"""

import importlib
import importlib.util
import pathlib
from typing import Any

from experiments.config import ConfigError

RECIPES = (
    "resnet20_cifar10",
    "vgg19_cifar100",
    "resnet18_tiny_imagenet",
    "efficientnet_b0_imagenet",
    "vit_b16_tiny_imagenet",
    "ablations",
    "digits_resnet20",
    "suite",
    "suite_ablations",
    "suite_causes",
    "suite_cifar",
    "suite_confirm",
    "suite_unseen",
    "suite_beyond",
    "suite_gates",
    "suite_ceiling",
    "suite_longer",
    "small_dense",
)
"""The names of the recipes; each is a module in this folder."""


def find(name: str) -> Any:
    """Returns the recipe with a name, or from a Python file.

    Raises:
        ConfigError: There is no such recipe, or the file defines none.
    """
    if name in RECIPES:
        return importlib.import_module(f"{__name__}.{name}")
    path = pathlib.Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"recipe must be one of {RECIPES} or a Python file; got {name!r}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise ConfigError(f"recipe {name} can't be read: {error}.") from error
    if not callable(getattr(module, "sweep", None)):
        raise ConfigError(f"recipe {name} must define a function sweep(scale).")
    return module

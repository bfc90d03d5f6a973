"""Pruning methods by the names that configurations use. A new method is one line here.

A name can be followed by settings in brackets, "dpai[alpha=0.9,allocation=uniform]", and then by
one of `AFTERWARDS`: "+repair" makes every kept weight effective, and the others are controls.
"""

import ast
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import dpai_jax as dpai
from dpai_jax import granularity
from experiments.config import DENSE, Config, ConfigError

Train = Callable[[Any, Any], Any]
"""Trains a network: from its variables and masks to its trained variables."""

AFTERWARDS = (
    "repair",  # every kept weight is made effective
    "shuffled",  # each layer keeps as many weights, at random places
    "fresh",  # the masks stay, and the weights are drawn anew
    "permuted",  # the masks stay, and the kept weights of a layer change places with each other
    "largest",  # the masks stay, and a layer's largest weights go to its kept places at random
)
"""What can be done to the masks of any method, or to the weights that training starts from."""

ALLOCATIONS: Mapping[str, dpai.Allocation] = {
    "er": dpai.er,
    "erk": dpai.erk,
    "global": dpai.global_threshold,
    "uniform": dpai.uniform,
}
"""How many weights each layer keeps, by the names that settings use."""


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How a network is pruned.

    Attributes:
        method: The method; or a function that makes it from a function that trains the network.
        batches: Number of batches that it may use, of ten images a class.
        temperature: What the logits are divided by in its loss.
        images: Images in the input that it draws itself.
        afterwards: What is done to its masks or to the weights, one of `AFTERWARDS`, or nothing.
    """

    method: dpai.Method | Callable[[Train], dpai.Method]
    batches: int = 0
    temperature: float = 1.0
    images: int = 1
    afterwards: str = ""

    def make(self, train: Train) -> dpai.Method:
        """Returns the method, ready to run."""
        return self.method(train) if callable(self.method) else self.method


METHODS: Mapping[str, Pruning] = {
    # Nothing is removed at sparsity 0, whatever the scores.
    DENSE: Pruning(dpai.Random()),
    "random": Pruning(dpai.Random(dpai.erk)),
    "random-er": Pruning(dpai.Random(dpai.er)),
    "random-uniform": Pruning(dpai.Random(dpai.uniform)),
    "magnitude": Pruning(dpai.Magnitude()),
    "magnitude-erk": Pruning(dpai.Magnitude(dpai.erk)),
    "snip": Pruning(dpai.SNIP(), batches=1),
    "snip-erk": Pruning(dpai.SNIP(dpai.erk), batches=1),
    "iterative-snip": Pruning(dpai.IterativeSNIP(), batches=1),
    "force": Pruning(dpai.FORCE(), batches=1),
    "grasp": Pruning(dpai.GraSP(), batches=1, temperature=200.0),
    "synflow": Pruning(dpai.SynFlow()),
    "synflow-erk": Pruning(dpai.SynFlow(allocation=dpai.erk)),
    "phew": Pruning(dpai.PHEW()),
    "npb": Pruning(dpai.NPB()),
    "ntk-sap": Pruning(dpai.NTKSAP(), images=64),
    "prospr": Pruning(dpai.ProsPr(), batches=4),
    "dpai": Pruning(dpai.DPaI()),
    "dpai-published": Pruning(dpai.DPaI.published()),
    "imp": Pruning(dpai.IMP),
}


_NAME = re.compile(r"(?P<base>[a-z-]+)(\[(?P<settings>[^][\s]+)\])?(\+(?P<afterwards>[a-z]+))?")


def find(name: str) -> Pruning:
    """Returns what a name stands for, such as "snip", "random+repair" or "dpai[beta=0]+shuffled".

    Raises:
        ConfigError: No method has this name, or it has no such setting.
    """
    parts = _NAME.fullmatch(name)
    if (
        parts is None
        or parts["base"] not in METHODS
        or parts["afterwards"] not in (None, *AFTERWARDS)
        or (parts["base"] == DENSE != name)
    ):
        endings = [f"+{afterwards}" for afterwards in AFTERWARDS]
        raise ConfigError(
            f"method must be one of {sorted(METHODS)}, with settings such as dpai[alpha=0.9], and "
            f"with one of {endings}, if you like (but not after dense); got {name!r}."
        )
    pruning = METHODS[parts["base"]]
    if parts["settings"] is not None:
        given = [setting.partition("=") for setting in parts["settings"].split(",")]
        changed = _with_settings(name, pruning.method, [(field, text) for field, _, text in given])
        pruning = dataclasses.replace(pruning, method=changed)
    return dataclasses.replace(pruning, afterwards=parts["afterwards"] or "")


def check_granularity(config: Config) -> None:
    """Checks which weights of a job stand or fall together.

    Raises:
        ConfigError: There is no such granularity, or it does not go with the method.
    """
    if config.granularity is None:
        return
    try:
        granularity.parsed(config.granularity)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error
    if find(config.method).afterwards in ("repair", "shuffled"):
        raise ConfigError(
            f"granularity can't go with +repair or +shuffled, which move single weights; got "
            f"{config.granularity!r} and {config.method!r}."
        )


def _with_settings(name: str, method: Any, given: list[tuple[str, str]]) -> Any:
    """Returns the method, or the class of a method, with other settings."""
    fields = {item.name: getattr(method, item.name, None) for item in dataclasses.fields(method)}
    can_set = {
        field: value
        for field, value in fields.items()
        if isinstance(value, bool | int | float | str) or value in ALLOCATIONS.values()
    }
    settings: dict[str, Any] = {}
    for field, text in given:
        if field not in can_set or field in settings:
            raise ConfigError(
                f"settings in a method's name must be name=value, each once, of "
                f"{sorted(can_set)}; got {name!r}."
            )
        settings[field] = _value(name, field, text, can_set[field])
    try:
        if not isinstance(method, type):
            return dataclasses.replace(method, **settings)
        make = functools.partial(method, **settings)
        make(lambda variables, _: variables)  # checks the settings
        return make
    except (TypeError, ValueError) as error:
        raise ConfigError(f"method {name!r} can't be: {error}") from error


def _value(name: str, field: str, text: str, now: Any) -> Any:
    """Reads a setting's value, which must have the type of the present one."""
    if isinstance(now, str):
        return text
    if callable(now):
        if text in ALLOCATIONS:
            return ALLOCATIONS[text]
        raise ConfigError(
            f"{field} must be one of {sorted(ALLOCATIONS)}; got {text!r} in {name!r}."
        )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    kind = type(now)
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    word = {bool: "True or False", int: "a whole number", float: "a number"}[kind]
    raise ConfigError(f"{field} must be {word}; got {text!r} in {name!r}.")

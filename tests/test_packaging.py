"""What is installed is what the project says: versions, ranges, the wheel's files, lazy imports."""

import ast
import configparser
import email
import importlib.metadata
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FOLDERS = ("dpai_jax", "experiments", "tests")
PYTHONS = ("3.11", "3.13")
# Extras that `make` does not install.
OPTIONAL = ("bench",)


def read_setup() -> configparser.ConfigParser:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    return setup


def applies(requirement: Requirement, python: str) -> bool:
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def read_pins(python: str) -> dict[str, Version]:
    """The version that requirements.txt gives each package on one Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins: dict[str, Version] = {}
    for requirement in (Requirement(line) for line in lines if not line.startswith("#")):
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name not in pins, f"{name} is pinned twice"
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", f"{requirement} is not pinned"
            pins[name] = Version(specifier.version)
    return pins


def requirements_of(part: str) -> list[Requirement]:
    """The requirements of the library or of one extra."""
    setup = read_setup()
    options, extras = setup["options"], setup["options.extras_require"]
    text = options["install_requires"] if part == "library" else extras[part]
    return [Requirement(line) for line in text.splitlines() if line]


def parts() -> list[str]:
    return ["library", *read_setup()["options.extras_require"]]


def read_ranges(*, without: tuple[str, ...] = ()) -> list[Requirement]:
    """The requirements of the library and of its extras, but for some."""
    return [r for part in parts() if part not in without for r in requirements_of(part)]


def required(*names: str) -> set[str]:
    return {canonicalize_name(r.name) for part in names for r in requirements_of(part)}


def imported(folder: str) -> set[str]:
    """The distributions whose modules a folder's files import, anywhere in them."""
    modules: set[str] = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(str(node.module).partition(".")[0])
    distributions = importlib.metadata.packages_distributions()
    foreign = modules - sys.stdlib_module_names - set(FOLDERS)
    return {canonicalize_name(name) for m in foreign for name in distributions.get(m, [m])}


def needs(requirement: Requirement) -> list[Requirement]:
    """What the installed package behind a requirement needs, its asked extras included."""
    extras = {"", *requirement.extras}
    needed = map(Requirement, importlib.metadata.requires(requirement.name) or ())
    return [
        r
        for r in needed
        if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints that runs `code`, with `path` in front of its modules."""
    first = f"import sys; sys.path.insert(0, {str(path)!r}); " if path else ""
    command = [sys.executable, "-c", first + code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def python_files(package: str, root: Path = ROOT) -> set[str]:
    return {path.relative_to(root).as_posix() for path in (root / package).rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built without a network from a copy of its tracked sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--wheel-dir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


def loaded_by(code: str) -> set[str]:
    """The top-level modules outside of the standard library that some code loads."""
    code += "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    return set(run_python(code, cwd=ROOT).split()) - sys.stdlib_module_names


def test_importing_the_library_loads_nothing_else_that_jax_and_optax_do_not() -> None:
    """So it takes at most 1.2 times as long, which a few rounds of this command show:

    for modules in "jax, optax" dpai_jax; do time python -c "import $modules"; done
    """
    assert loaded_by("import dpai_jax") - loaded_by("import jax, optax") == {"dpai_jax"}


def test_the_library_requires_what_it_imports() -> None:
    # Whoever has an NNX module has flax. jaxlib is a part of jax that must be of its release.
    assert imported("dpai_jax") - {"flax"} == required("library", "show") - {"jaxlib"}


def test_the_experiments_require_what_they_import() -> None:
    imports = imported("experiments")
    assert imports <= required("library", "experiments", "bench")
    # tensorflow-datasets imports these two, and does not require them.
    assert required("experiments") - imports == {"array-record", "importlib-resources"}


def test_the_tests_require_what_they_import() -> None:
    assert imported("tests") <= required(*parts())


@pytest.mark.parametrize("python", PYTHONS)
def test_the_ranges_of_setup_cfg_admit_every_pin(python: str) -> None:
    pins = read_pins(python)
    for requirement in read_ranges(without=OPTIONAL):
        if applies(requirement, python):
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier


def test_every_package_that_is_needed_is_pinned() -> None:
    """From setup.cfg's ranges on, pip has nothing left to choose; holds for the running Python."""
    pins = read_pins(platform.python_version().rpartition(".")[0])
    waiting, seen = read_ranges(without=OPTIONAL), set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) not in seen:
            seen.add(str(requirement))
            assert canonicalize_name(requirement.name) in pins
            waiting += needs(requirement)


def test_the_pins_cover_both_ends_of_the_jax_releases_supported() -> None:
    (supported,) = [r.specifier for r in read_ranges() if r.name == "jax"]
    oldest, newest = (read_pins(python)["jax"].release[:2] for python in PYTHONS)
    assert (oldest, newest) == ((0, 10), (0, 12))
    assert "0.9.9" not in supported
    assert "0.13.0" not in supported


def test_the_wheel_states_the_version_licence_and_ranges_of_setup_cfg(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        stated = email.message_from_bytes(archive.read(path))
    assert stated["Version"] == read_setup()["metadata"]["version"]
    assert stated["Requires-Python"] == ">=3.11"
    assert stated["License-Expression"] == "Apache-2.0"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {Requirement(text) for text in stated.get_all("Requires-Dist", [])} == {
        Requirement(str(r) if part == "library" else f'{r}; extra == "{part}"')
        for part in parts()
        for r in requirements_of(part)
    }


def test_the_wheel_holds_the_library_and_its_type_marker_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == python_files("dpai_jax") | {"dpai_jax/py.typed"}


def test_the_library_imports_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = "import dpai_jax; print(dpai_jax.__file__)"
    where = run_python(code, cwd=tmp_path, path=installed)
    assert Path(where) == installed / "dpai_jax" / "__init__.py"

"""Compiled programs on disk, so that the next process need not compile them again."""

from __future__ import annotations

import os
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

from dpai_jax.tools import disk
from dpai_jax.tools.trees import shown


def user_folder() -> pathlib.Path:
    """`dpai_jax` in the user's cache folder, which is `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(base).expanduser() / "dpai_jax"


def cache(folder: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Keeps what is compiled from now on in a folder, where the next process finds it.

    One line at the start of a script or a notebook. It switches on JAX's own compilation cache, for
    all that the process compiles, also beside pruning. The programs of pruning are kept by the
    network that they are for, and found without a trace, on one device and in one process. What
    NumPy has run in a call of `prune` is compiled for the next process after it, in the background,
    and a process that ends waits for that.

    Files of other releases of JAX or of this library, or for other devices, are never read, and the
    folder can be deleted at any time. Only you should be able to write to it, as its files hold
    programs that are run.

    Example:
      >>> import tempfile, dpai_jax as dpai
      >>> folder = dpai.cache(tempfile.mkdtemp())

    Args:
      folder: where; if not given `dpai_jax/compiled` in the user's cache folder, `$XDG_CACHE_HOME`
        or `~/.cache`. It is made if it is not there.

    Returns:
      The folder.

    Raises:
      TypeError: if `folder` is not a path.
      OSError: if it cannot be made or written.
    """
    if folder is None:
        folder = user_folder() / "compiled"
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {shown(folder)}")
    path = pathlib.Path(folder).expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK):
        raise PermissionError(f"folder must be writable, got {path}")
    jax.config.update("jax_compilation_cache_dir", str(path))
    # By default JAX keeps only programs that take a second to compile. Pruning has smaller ones.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    disk.keep_in(path / "programs")
    # JAX looks for the folder once, at the first compilation, unless it is reset.
    compilation_cache.reset_cache()
    return path

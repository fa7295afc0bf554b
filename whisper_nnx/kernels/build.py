"""Compiles `kernels.cc` for this machine, once, into the user's cache folder, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from pathlib import Path

from whisper_nnx.user_cache import make_private_folder, user_cache_folder

SWITCH = "WHISPER_NNX_KERNELS"  # 0: do without
_SOURCE, _HEADER = (Path(__file__).with_name(name) for name in ("kernels.cc", "vectors.h"))
_FOR_THIS = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
_FLAGS = ("-O3", _FOR_THIS, "-std=gnu++17", "-shared", "-fPIC")
_LONGEST_S = 120


def load() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no C++ compiler, or where $WHISPER_NNX_KERNELS is 0.

    $CXX names the compiler, else it is c++, g++ or clang++. Where one is there and fails, or the cache folder cannot be
    used, a warning says so.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None or os.environ.get(SWITCH) == "0":
        return None
    try:
        folder = (user_cache_folder() / "whisper_nnx" / "kernels").resolve()
        make_private_folder(folder)
        library = folder / f"{_key(compiler)}.so"
        if not library.exists():
            _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        told = f"no kernels for this CPU, decoding is slower: {_problem(error)}; {SWITCH}=0 does without"
        warnings.warn(told, stacklevel=2)
        return None


def _problem(error: Exception) -> str:
    """In one line: of what a compiler says, the first error."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [*error.stderr.strip().splitlines(), f"{error.cmd[0]} failed with exit code {error.returncode}"]
    return next((line for line in lines if "error" in line), lines[-1])


def _compile(compiler: str, library: Path) -> None:
    """Whole or not at all: another process may do the same at this moment."""
    import jax

    partial = library.with_name(f".{library.name}.{os.getpid()}.partial")
    command = [compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LONGEST_S)
        os.replace(partial, library)
    finally:
        partial.unlink(missing_ok=True)


def _key(compiler: str) -> str:
    """Of all that decides what is compiled: source, XLA's headers, compiler, and the processor's instructions."""
    import jaxlib

    source = _SOURCE.read_bytes() + _HEADER.read_bytes()
    said = (source, jaxlib.__version__, _FLAGS, compiler, os.stat(compiler).st_mtime, _instructions())
    return hashlib.blake2b(repr(said).encode(), digest_size=16).hexdigest()


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())

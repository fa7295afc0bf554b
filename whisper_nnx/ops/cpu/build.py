"""Compiles `kernels.cc` for this machine, once, into the user's cache folder, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import time
import warnings
from contextlib import suppress
from pathlib import Path

from whisper_nnx.runtime.user_cache import locked, make_private_folder, read_own, user_cache_folder, write_whole

SWITCH = "WHISPER_NNX_KERNELS"  # 0: disabled
_SOURCE, _HEADER = (Path(__file__).with_name(name) for name in ("kernels.cc", "vectors.h"))
_FOR_THIS = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
_FLAGS = ("-O3", _FOR_THIS, "-std=gnu++17", "-shared", "-fPIC")
_LONGEST_S = 120
_REMEMBERED_S = 24 * 3600  # the cause may be fixed: a full disk, too little memory, a missing package


def load() -> ctypes.CDLL | None:
    """Loads the kernels, compiling them if necessary; None without a C++ compiler or if $WHISPER_NNX_KERNELS is 0.

    The compiler is $CXX, c++, g++ or clang++. Warns if it fails or if the cache folder cannot be used. A failure is
    remembered for a day, for this compiler.
    """
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None or os.environ.get(SWITCH) == "0":
        return None
    try:
        folder = (user_cache_folder() / "whisper_nnx" / "kernels").resolve()
        make_private_folder(folder)
        key = _key(compiler)
        return _kept(folder, key) or _built(folder, key, compiler)
    except (OSError, RuntimeError) as error:
        message = f"no kernels for this CPU, decoding is slower: {error}; {SWITCH}=0 does without"
        warnings.warn(message, stacklevel=2)
        return None


def _kept(folder: Path, key: str) -> ctypes.CDLL | None:
    """Opens the library with this key; None if there is none. Deletes damaged and foreign files."""
    for file in sorted(folder.glob(f"{key}-*.so")):
        data = read_own(file)
        # Verified before it is opened: a damaged library crashes the process.
        if data is not None and file.name == _name(key, data):
            with suppress(OSError, RuntimeError):
                return _opened(file, key)
        file.unlink(missing_ok=True)
    return None


def _name(key: str, library: bytes) -> str:
    return f"{key}-{hashlib.blake2b(library, digest_size=16).hexdigest()}.so"


def _opened(file: Path, key: str) -> ctypes.CDLL:
    """Raises OSError for a file that is not a library, RuntimeError for one from another source."""
    library = ctypes.CDLL(str(file))
    try:
        library.Key.restype = ctypes.c_char_p
        stamp = library.Key()
    except AttributeError:
        stamp = None
    if stamp != key.encode():
        raise RuntimeError(f"{file} is not the library that was compiled")
    return library


def _built(folder: Path, key: str, compiler: str) -> ctypes.CDLL:
    """Compiles the library, unless another thread or process just did, or it failed within the last day.

    Raises OSError, RuntimeError.
    """
    failed = folder / f"{key}.failed"
    with locked(folder / f".{key}.lock", 2 * _LONGEST_S):
        if (library := _kept(folder, key)) is not None:
            return library
        if reason := _earlier_failure(failed):
            raise RuntimeError(reason)
        try:
            library = _opened(_compiled(compiler, folder, key), key)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            reason = _problem(error)
            # A time limit or a signal (busy machine, full disk) is temporary and not remembered.
            if isinstance(error, subprocess.CalledProcessError) and error.returncode > 0:
                write_whole(failed, reason.encode())
            raise RuntimeError(reason) from error
        failed.unlink(missing_ok=True)
        return library


def _earlier_failure(file: Path) -> str:
    """The compiler's error of the last day; empty if there was none."""
    reason = (read_own(file) or b"").decode(errors="replace")
    if not reason or not 0 <= time.time() - file.stat().st_mtime < _REMEMBERED_S:
        return ""
    return f"{reason} (remembered; delete {file} to compile again)"


def _problem(error: Exception) -> str:
    """One line: the first error among the compiler's messages."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    lines = [*error.stderr.strip().splitlines(), f"{error.cmd[0]} failed with exit code {error.returncode}"]
    return next((line for line in lines if "error" in line), lines[-1])


def _compiled(compiler: str, folder: Path, key: str) -> Path:
    """Compiles the library into a file whose name has its digest."""
    import jax

    partial = folder / f".{key}.{os.getpid()}.partial"
    command = [compiler, *_FLAGS, f'-DKEY="{key}"', f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_LONGEST_S)
        partial.chmod(0o700)
        file = folder / _name(key, partial.read_bytes())
        os.replace(partial, file)
        return file
    finally:
        partial.unlink(missing_ok=True)


def _key(compiler: str) -> str:
    """Hash of what decides the result: source, XLA's headers, compiler, flags, and the processor's instructions."""
    import jaxlib

    source = _SOURCE.read_bytes() + _HEADER.read_bytes()
    parts = (source, jaxlib.__version__, _FLAGS, compiler, os.stat(compiler).st_mtime, _instructions())
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())

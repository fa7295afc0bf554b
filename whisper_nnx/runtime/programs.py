"""Stored programs: traced and lowered once, saved as StableHLO (`jax.export`), and loaded by later processes.

JAX's compilation cache stores machine code, but a program has to be traced and lowered to be found in it. The programs
stored here are found by their arguments' shapes and static values.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial, update_wrapper
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.export

from whisper_nnx.runtime.devices import divided
from whisper_nnx.runtime.flat import Structure, flat, takes_flat, whole
from whisper_nnx.runtime.forking import refuse_after_fork
from whisper_nnx.runtime.user_cache import locked, read_own, refuse_if_others_can_write, write_whole

AnyType = TypeVar("AnyType", bound=type)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# JAX gives no guarantee for these across versions; other versions of it have other files.
_custom_calls = ["LayoutConstraint"]
_keys: list[Callable[[], str | None]] = []
# JAX's settings that change what is traced.
_SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_high_dynamic_range_gumbel",
    "jax_numpy_dtype_promotion",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
)
_NO_JIT = "jax_disable_jit"
_KNOWN = ("whisper_nnx", "jax", "jaxlib", "flax", "numpy", "ml_dtypes", "collections", "builtins")
_MOST_FILES = 500  # about 100 kB each; the oldest go first
_DIGEST_BYTES = 32
_LONGEST_S = 120  # that a process waits for another one that traces the same program

_folder: Path | None = None
_found: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
_MISSING: Any = object()
_finding = threading.RLock()


def keep_programs(folder: str | os.PathLike[str] | None) -> None:
    """Stores the programs of transcription in `folder` and loads them from there; None stops that.

    If the compilation cache is on too, and an earlier process has run the same model shape, options and batch sizes
    (with `warmup`, for example), nothing is traced or compiled. The folder is created if it is missing. Its files are
    executed: those that other users could have written, or whose digest does not match, are replaced. Files of other
    versions of JAX or of this package are ignored. Raises OSError if the folder cannot be created, and PermissionError
    (a subclass) if other users can write to it or replace it.
    """
    global _folder
    path = None if folder is None else Path(folder).expanduser().resolve()
    if path is not None:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        refuse_if_others_can_write(path, of_root=True)
    with _finding:
        _folder = path
        _found.clear()


def exportable(kind: AnyType) -> AnyType:
    """Lets stored programs return a named tuple, or a dataclass that is registered with JAX."""
    name = f"{kind.__module__}.{kind.__name__}"
    if issubclass(kind, tuple):
        jax.export.register_namedtuple_serialization(kind, serialized_name=name)
    else:
        jax.export.register_pytree_node_serialization(
            kind, serialized_name=name, serialize_auxdata=pickle.dumps, deserialize_auxdata=pickle.loads
        )
    return kind


def register_custom_calls(names: Sequence[str]) -> None:
    """Allows these custom-call targets in stored programs."""
    _custom_calls.extend(names)


def key_by(part: Callable[[], str | None]) -> Callable[[], str | None]:
    """Decorates a function that returns what else decides a program, as text; None: do not store what is traced now."""
    _keys.append(part)
    return part


class Program:
    """`jax.jit` of a function, stored by `keep_programs`. On a mesh, its `rows` are `divided`.

    The arrays of `donated` arguments are reused for the results; the caller's are gone.

    Plain `jax.jit` where the arguments are traced or sharded, or have functions or modules from outside this package:
    these could be identified by name only, which does not identify a program.
    """

    __name__: str

    def __init__(
        self,
        function: Callable[..., Any],
        static_argnames: Sequence[str] = (),
        rows: Sequence[str] = (),
        donated: Sequence[str] = (),
    ):
        self._function, self._static, self.donated = function, tuple(static_argnames), tuple(donated)
        self._signature = inspect.signature(function)
        taking = takes_flat(function)
        traced = divided(taking, rows, self._static) if rows else taking
        self.jitted = jax.jit(traced, static_argnames=self._static, donate_argnames=self.donated)
        update_wrapper(self, function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        refuse_after_fork()
        args, options = tuple(map(flat, args)), {name: flat(value) for name, value in options.items()}
        if _folder is None or (context := _context()) is None:
            return self.jitted(*args, **options)
        bound = self._signature.bind(*args, **options)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name not in self._static}
        statics = {name: bound.arguments[name] for name in self._static}
        leaves, tree = jax.tree.flatten(given)
        if not all(map(_is_plain, leaves)):
            return self.jitted(*args, **options)
        call = _find(self, tree, tuple(map(jax.typeof, leaves)), tuple(statics.items()), context)
        return self.jitted(*args, **options) if call is None else call(*_together(leaves))

    def places_of_donated(self, tree: Any) -> tuple[int, ...]:
        """The numbers of the arrays that are donated, among those of a structure of arguments by name."""
        numbered = jax.tree.unflatten(tree, range(tree.num_leaves))
        return tuple(number for name in self.donated for number in jax.tree.leaves(numbered[name]))

    def exported(self, tree: Any, shapes: Sequence[Any], statics: dict[str, Any]) -> jax.export.Exported:
        """Traces and lowers it for leaves of these shapes."""

        def flat(*leaves: Any) -> Any:
            given = jax.tree.unflatten(tree, leaves)
            return self._function(**{name: whole(value) for name, value in given.items()}, **statics)

        checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in _custom_calls]
        structs = [jax.ShapeDtypeStruct(s.shape, s.dtype, weak_type=s.weak_type) for s in shapes]
        return jax.export.export(jax.jit(flat), disabled_checks=checks)(*structs)


def program(
    static_argnames: Sequence[str] = (), rows: Sequence[str] = (), donated: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Program]:
    """A decorator: as `jax.jit`; `rows`: see `divided`; `donated`: see `Program`."""
    return lambda function: Program(function, static_argnames, rows, donated)


def _context() -> tuple[Any, ...] | None:
    """What decides a program beside its arguments; None if it must not be stored."""
    keys = tuple(part() for part in _keys)
    if None in keys or getattr(jax.config, _NO_JIT):
        return None
    return (*keys, *(getattr(jax.config, name, None) for name in _SETTINGS))


def _find(*call: Any) -> Callable[..., Any] | None:
    """Returns a function that runs the program of a call (`_kept_or_made`'s arguments), shared between threads.

    None for a program that cannot be stored.
    """
    if (found := _found.get(call, _MISSING)) is _MISSING:
        with _finding:
            if (found := _found.get(call, _MISSING)) is _MISSING:
                program, tree, _, statics, _ = call
                donated = program.places_of_donated(tree)
                can_be_kept = _is_known(tree) and _shows_all(statics)
                made = jax.jit(_kept_or_made(*call).call, donate_argnums=donated) if can_be_kept else None
                found = _found[call] = made
    return found


def _is_known(tree: Any) -> bool:
    """Whether the text of a structure identifies everything in it."""
    kind, static = tree.node_data() or (None, None)
    if isinstance(static, Structure):  # of a Flat module
        return _is_known(static.tree)
    return _shows_all((kind, static)) and all(map(_is_known, tree.children()))


def _shows_all(value: Any) -> bool:
    """Whether its text identifies it. The text of a function or class is its name, which must be a known one."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_shows_all, value))
    if isinstance(value, Mapping):
        return all(map(_shows_all, value.items()))
    if isinstance(value, partial):
        return _shows_all((value.func, value.args, value.keywords))
    if callable(value) and value is not type(None):
        return _is_ours(value)
    return _ADDRESS.search(repr(value)) is None


def _is_ours(value: Any) -> bool:
    """Whether its qualified name leads to it, in this package or one that it depends on."""
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value and module.partition(".")[0] in _KNOWN


def _kept_or_made(
    program: Program,
    tree: Any,
    shapes: tuple[Any, ...],
    statics: tuple[tuple[str, Any], ...],
    context: tuple[Any, ...],
) -> jax.export.Exported:
    """Loads the stored program; if it is missing or damaged, makes it and writes it atomically."""
    assert _folder is not None
    # The structure has all static values of modules, and functions and classes by name.
    structure = _ADDRESS.sub("", str(_whole_structure(tree)))
    parts = (jax.default_backend(), program.__name__, structure, shapes, statics, context, _sources())
    name = hashlib.blake2b(repr(parts).encode(), digest_size=20).hexdigest()
    file = _folder / f"{program.__name__}-{name}.stablehlo"
    if (kept := _kept(file)) is not None:
        return kept
    with locked(file.with_name(f".{file.name}.lock"), _LONGEST_S):
        if (kept := _kept(file)) is None:  # no other process made it while this one waited
            kept = program.exported(tree, shapes, dict(statics))
            _keep(file, bytes(kept.serialize()))
    return kept


def _kept(file: Path) -> jax.export.Exported | None:
    """Returns None if the file is missing or is not what was written under this name."""
    content = read_own(file) or b""
    data = content[_DIGEST_BYTES:]
    if content[:_DIGEST_BYTES] != _digest(file, data):
        return None
    try:
        return jax.export.deserialize(bytearray(data))
    except Exception:  # JAX documents no exception type for unreadable data
        return None


def _keep(file: Path, data: bytes) -> None:
    """Writes it; a full disk or read-only folder is ignored."""
    with suppress(OSError):
        write_whole(file, _digest(file, data) + data)
        for old in sorted(file.parent.glob("*.stablehlo"), key=lambda path: path.stat().st_mtime)[:-_MOST_FILES]:
            old.unlink(missing_ok=True)


def _digest(file: Path, data: bytes) -> bytes:
    """Digest of a program and its file name, so that a renamed file is not accepted."""
    return hashlib.blake2b(file.name.encode() + b"\0" + data, digest_size=_DIGEST_BYTES).digest()


def _is_plain(leaf: Any) -> bool:
    """Whether it is on one device of the default backend, or on the host."""
    if isinstance(leaf, jax.core.Tracer):
        return False
    devices = leaf.devices() if isinstance(leaf, jax.Array) else ()
    return len(devices) <= 1 and all(device.platform == jax.default_backend() for device in devices)


def _together(leaves: list[Any]) -> list[Any]:
    """The arrays on the device of the first one, unlike NumPy's, of which any will do.

    The results of a stored program are tied to the device that it ran on, those of `jax.jit` are not.
    """
    devices = [leaf.device if isinstance(leaf, jax.Array) else None for leaf in leaves]
    first = next((device for device in devices if device is not None), None)
    return [
        leaf if device in (None, first) else jax.device_put(leaf, first)
        for leaf, device in zip(leaves, devices, strict=True)
    ]


def _whole_structure(tree: Any) -> Any:
    """The structure of arguments by name, with that of modules in place of that of `Flat` ones."""
    given = jax.tree.unflatten(tree, range(tree.num_leaves))
    return jax.tree.structure({name: whole(value) for name, value in given.items()})


@cache
def _sources() -> str:
    from importlib.metadata import version

    source = hashlib.blake2b(digest_size=20)
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):  # of the whole package
        source.update(file.read_bytes())
    return f"{version('jax')} {version('jaxlib')} {version('flax')} {source.hexdigest()}"

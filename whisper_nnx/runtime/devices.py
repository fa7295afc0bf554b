"""Several devices: meshes, rows of a batch over the axis `data`, and results read by every process.

A mesh has the axes `data` (rows of a batch) and `model` (heads and MLP channels, see `model/sharding.py`), or one of
them. What is computed on it follows from its arrays: a model whose parameters are on a mesh runs on that mesh.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, MODEL = "data", "model"


def make_mesh(data: int | None = None, model: int = 1, devices: Any = None) -> Mesh:
    """Makes a mesh of data * model devices.

    Args:
      data: over how many devices, or groups of them, the rows of a batch are divided; None: as many as there are.
      model: over how many devices each layer is divided.
      devices: to choose from; default: those of this process.

    Raises:
      ValueError: there are not so many devices.
    """
    chosen = list(jax.local_devices() if devices is None else devices)
    for name, size in ((DATA, data), (MODEL, model)):
        if (name, size) != (DATA, None) and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"the axis {name} of a mesh has the size {size!r}, expected a whole number of at least 1")
    data = max(1, len(chosen) // model) if data is None else data
    if data * model > len(chosen):
        raise ValueError(
            f"a mesh of {data} x {model} devices ({DATA} x {MODEL}) needs {data * model}, but there are {len(chosen)}"
        )
    return _mesh(np.array(chosen[: data * model]).reshape(data, model), (DATA, MODEL))


def as_mesh(devices: int | str | Mesh, among: Sequence[jax.Device] | None = None, name: str = "devices") -> Mesh:
    """The mesh that an option, by `name`, means: a number of devices of this process, "all" of them, or a mesh.

    among: those to choose from. Raises ValueError for anything else, and for a mesh with other axes.
    """
    if isinstance(devices, Mesh):
        if not {DATA, MODEL}.issuperset(devices.axis_names):
            raise ValueError(
                f"a mesh with the axes {', '.join(map(str, devices.axis_names))} has others than {DATA} and {MODEL}; "
                "make one with make_mesh"
            )
        return _mesh(devices.devices, devices.axis_names)
    among = jax.local_devices() if among is None else among
    if devices == "all":
        return make_mesh(devices=among)
    if isinstance(devices, bool) or not isinstance(devices, int | np.integer) or devices < 1:
        raise ValueError(f"{name}={devices!r} must be a number of devices, 'all', or a mesh")
    if devices > len(among):
        raise ValueError(f"{name}={devices} is more than there are; choose at most {len(among)}")
    return make_mesh(int(devices), devices=among)


def _mesh(devices: np.ndarray, names: tuple[Any, ...]) -> Mesh:
    # Auto: the compiler divides the work. The default, Explicit, rejects a product over a divided axis.
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def mesh_of(array: Any) -> Mesh | None:
    """The mesh of an array on several devices, else None."""
    sharding = getattr(array, "sharding", None)
    mesh: Any = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if mesh is not None and mesh.size > 1 else None


def rounded_up(rows: int, mesh: Mesh | None) -> int:
    """The next number of rows that the axis `data` divides."""
    parts = _size(mesh, DATA)
    return -(-rows // parts) * parts


def put_rows(array: Any, mesh: Mesh) -> jax.Array:
    """Places an array [B,...], which all processes have, on a mesh: rows over `data` where it divides B."""
    return put(array, NamedSharding(mesh, rows_spec(len(array), mesh)))


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """Places an array that all processes have; one that they have together must be on the same mesh."""
    if sharding.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def rows_spec(rows: int, mesh: Any) -> PartitionSpec:
    """Of arrays [B,...]: over `data` where it divides B."""
    return PartitionSpec(DATA) if _size(mesh, DATA) > 1 and rows % _size(mesh, DATA) == 0 else PartitionSpec()


def fetch(tree: Any) -> Any:
    """Arrays as NumPy's, on every process: with several, all of them must call this."""
    if all(not isinstance(x, jax.Array) or x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    from jax.experimental.multihost_utils import process_allgather

    return process_allgather(tree, tiled=True)


def empty_rows(one: Any, rows: int) -> Any:
    """Zeros for `rows` rows like those of `one` [B,...], on the same devices."""
    if mesh_of(jax.tree.leaves(one)[0]) is None:
        return _zeros(one, rows)

    def zeros(x: jax.Array) -> jax.Array:
        shape, mesh, sharding = (rows, *x.shape[1:]), mesh_of(x), x.sharding
        assert isinstance(sharding, NamedSharding)
        assert mesh is not None
        spec = PartitionSpec(*rows_spec(rows, mesh) or (None,), *sharding.spec[1:])
        return jnp.zeros(shape, x.dtype, device=NamedSharding(mesh, spec))

    return jax.tree.map(zeros, one)


@partial(jax.jit, static_argnames="rows")
def _zeros(one: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), one)


def divided(function: Callable[..., Any], rows: Sequence[str], static: Sequence[str] = ()) -> Callable[..., Any]:
    """`function`, within a program: on a mesh, each part of the axis `data` computes its own rows, by itself.

    Nothing is exchanged between the parts, and a loop ends on each when its own rows are done. Where the rows cannot be
    divided evenly, every part computes all of them.

    Args:
      function: takes and returns arrays of B rows; rows do not depend on each other.
      rows: its arguments whose arrays are [B,...]. An object in them with a method `by_rows(row, other)` returns itself
        with one of the two in place of each array.
      static: its arguments that are no arrays.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        arrays = {name: value for name, value in bound.arguments.items() if name not in static}
        compute = partial(function, **{name: bound.arguments[name] for name in static})
        mesh: Any = next(filter(None, map(traced_mesh, jax.tree.leaves(arrays))), None)
        row, other = rows_spec(len(jax.tree.leaves(arrays[rows[0]])[0]), mesh), PartitionSpec()
        if row == other:
            return compute(**arrays)
        specs = {name: _specs(value, row, other) if name in rows else other for name, value in arrays.items()}
        own = jax.shard_map(
            lambda arrays: compute(**arrays),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=_specs(jax.eval_shape(lambda arrays: compute(**arrays), arrays), row, other),
            axis_names={DATA} if _size(mesh, MODEL) > 1 else set(mesh.axis_names),
            check_vma=False,
        )
        return own(arrays)

    return call


def _specs(value: Any, row: PartitionSpec, other: PartitionSpec) -> Any:
    def knows(x: Any) -> bool:
        return hasattr(x, "by_rows")

    return jax.tree.map(lambda x: x.by_rows(row, other) if knows(x) else row, value, is_leaf=knows)


def put_rows_of(array: jax.Array, new: jax.Array, places: jax.Array) -> jax.Array:
    """Within `divided`: an array of B windows with those of `new` in some of their places.

    array [B*K,...], new [n*K,...]: K rows for each window. places [n]: numbers in the whole batch; -1: none.
    """
    each = len(new) // len(places)
    mesh = traced_mesh(array)
    if mesh is not None and DATA in mesh.manual_axes:
        places = places - jax.lax.axis_index(DATA) * (len(array) // each)

    def put(i: Any, array: jax.Array) -> jax.Array:
        place = places[i] * each
        here, at = (place >= 0) & (place < len(array)), jnp.clip(place, 0, len(array) - each)
        one = jax.lax.dynamic_slice_in_dim(new, i * each, each)
        one = jnp.where(here, one, jax.lax.dynamic_slice_in_dim(array, at, each))
        return jax.lax.dynamic_update_slice_in_dim(array, one, at, axis=0)

    return put(0, array) if len(places) == 1 else jax.lax.fori_loop(0, len(places), put, array)


def traced_mesh(array: Any) -> Any:
    """The abstract mesh that an array or tracer is on; None: a single device."""
    sharding = getattr(jax.typeof(array), "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    return None if mesh is None or mesh.empty or mesh.size == 1 else mesh


def over_model(array: jax.Array, axis: int) -> jax.Array:
    """Within a program: divides an axis (heads) over `model`, and leaves the others to the compiler."""
    mesh = traced_mesh(array)
    if _size(mesh, MODEL) == 1 or array.shape[axis] % _size(mesh, MODEL):
        return array
    spec: list[Any] = [PartitionSpec.UNCONSTRAINED] * array.ndim
    spec[axis] = MODEL
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))


def divides_heads(mesh: Any) -> bool:
    """Whether a mesh, if any, divides layers over `model`."""
    return _size(mesh, MODEL) > 1


def over_data(array: jax.Array) -> jax.Array:
    """Within a program: divides the rows over `data`, and leaves the other axes to the compiler."""
    mesh = traced_mesh(array)
    if not (rows := rows_spec(len(array), mesh)):
        return array
    spec = PartitionSpec(*rows, *[PartitionSpec.UNCONSTRAINED] * (array.ndim - 1))
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def placed(array: jax.Array, mesh: Mesh | None, heads_axis: int | None = None) -> jax.Array:
    """Within a program: places a new array [B,...] on a mesh, its rows over `data` and an axis (heads) over `model`."""
    if mesh is None:
        return array
    spec: list[Any] = [*rows_spec(len(array), mesh), *[None] * array.ndim][: array.ndim]
    if heads_axis is not None and array.shape[heads_axis] % _size(mesh, MODEL) == 0 and MODEL in mesh.axis_names:
        spec[heads_axis] = MODEL
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))


def _size(mesh: Any, axis: str) -> int:
    """Parts of an axis; 1 within `divided`, where it is divided already."""
    return 1 if mesh is None or axis in getattr(mesh, "manual_axes", ()) else mesh.shape.get(axis, 1)

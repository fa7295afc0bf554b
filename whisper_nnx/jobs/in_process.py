"""`run`: a job in this process, with a model."""

from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, Unpack

import jax
import numpy as np
from flax import nnx

from whisper_nnx.audio.options import VadOptions
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.jobs.changes import warn_of_changes
from whisper_nnx.jobs.export import export_settings, exportable
from whisper_nnx.jobs.inputs import absolute, read_input, some_exist
from whisper_nnx.jobs.job import Job, plan, write_once
from whisper_nnx.jobs.status import Status, status
from whisper_nnx.jobs.worker import EXPIRES_S, DeviceError, TranscribeAll, work
from whisper_nnx.model.sharding import mesh_of
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.runtime.console import one_line
from whisper_nnx.transcription.batch import is_out_of_memory
from whisper_nnx.transcription.changes import TranscribeChanges
from whisper_nnx.transcription.language_models import window_with_lm
from whisper_nnx.transcription.options import CallOptions, TranscribeOptions
from whisper_nnx.transcription.stream import iter_transcripts
from whisper_nnx.transcription.windows import tokenizer_of

# Options that change no result.
_OF_PROCESSES = ("devices", "readers", "verbose", "print_colors", "print_special", "progress")


def run(
    model: Whisper,
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    shard_s: float | None = None,
    expires_s: float = EXPIRES_S,
    output_format: str | None = None,
    subtitles: Mapping[str, Any] | None = None,
    **options: Unpack[TranscribeChanges],
) -> Status:
    """Transcribes the recordings of an input into a folder, or what is left of them; other workers may do the same.

    Args:
      model: a model with a tokenizer.
      input: a folder, a pattern, a list, JSON lines, a tar or parquet, see `read_input`.
      output: folder of the job.
      shard_s: audio in a shard, in s; see `plan`.
      expires_s: after how many seconds of silence another worker's shard is taken over.
      output_format: formats in which each shard that is done is also written, into `output/export`: "srt,parquet".
      subtitles: options of subtitles.
      options: those of `transcribe`. Models are known again by their weights, functions by module and name.

    Returns:
      How many recordings are done, and how many failed: the reasons are in `failed`.

    Raises:
      ValueError: another job is in that folder; or nothing is in the input; or a function has no name: a lambda;
        or invalid options.
      TypeError: an unknown option.
      MissingPackageError: a format needs a package that is not installed.
    """
    job = planned(input, output, shard_s, options, export_settings(output_format, subtitles or {}, options))
    work_with(lambda: model, job, options, expires_s)
    return status(job)


def planned(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    shard_s: float | None,
    options: TranscribeChanges,
    written: dict[str, Any],
    workers: int = 1,
) -> Job:
    """The job of `run`; written: the settings of what is exported; workers: see `plan`."""
    with warnings.catch_warnings(action="ignore"):  # `iter_transcripts` issues them
        call, changed = CallOptions.split(options)
        call.check(TranscribeOptions.of(**changed))
    source = os.fspath(input)
    settings = {"input": absolute(source), "planned_by": "python", **_stored(options), **written}
    is_new = not (Path(output) / "plan").exists()
    job = plan(
        os.path.abspath(output), exportable(some_exist(read_input(source)), settings), settings, shard_s, workers
    )
    if not is_new:
        warn_of_changes(job, source)
    return job


def _stored(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options on which results depend, as JSON: models by their digest, functions by their name."""
    return {
        name: json.loads(json.dumps(value, default=partial(_as_json, name)))
        for name, value in options.items()
        if name not in _OF_PROCESSES
    }


def _as_json(option: str, value: Any) -> Any:
    if isinstance(value, Whisper):
        return f"model {digest(value)}"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping | VadOptions):
        return dict(value) if isinstance(value, Mapping) else vars(value)
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    if (name := _name_of(value)) is None:
        raise ValueError(
            f"{option}={shorten(repr(value), 100)} has no name by which another process would find it; "
            "define it at the top level of a module"
        )
    return name


def _name_of(function: Any) -> str | None:
    """Of a function its module and name, of one with arrays its type and a digest; None if that is not the whole."""
    if jax.tree_util.all_leaves([function]):
        module, name = (getattr(function, key, "") for key in ("__module__", "__qualname__"))
        with suppress(AttributeError, ImportError, ValueError):
            if pkgutil.resolve_name(f"{module}:{name}") is function:
                return f"{module}.{name}"
        return None
    is_module = isinstance(function, nnx.Module)
    about = nnx.graphdef(function) if is_module else jax.tree_util.tree_structure(function)
    kind = f"{type(function).__module__}.{type(function).__qualname__}"
    static = re.sub(r" at 0x[0-9a-f]+", "", f"{kind} {about}")
    if "<locals>" in static or "<lambda>" in static:
        return None
    return f"{kind} {_digest(static, nnx.state(function) if is_module else function)}"


def work_with(
    load: Callable[[], Whisper], job: Job, options: TranscribeChanges, expires_s: float, name: str | None = None
) -> int:
    """Works on a job with the model that `load` returns -> 0, the exit status of a worker.

    Raises ValueError for another model than that with which the job was started.
    """
    require_model(job, model := load())
    options = _with_lm(job, model, options)
    batched = options.get("batch_size", 1) > 1 or options.get("devices") is not None or mesh_of(model) is not None
    transcribe_all = _stopping(partial(iter_transcripts, model, **options))
    work(job, transcribe_all, batched=batched, name=name, expires_s=expires_s)
    return 0


def _stopping(transcribe_all: TranscribeAll) -> TranscribeAll:
    """`transcribe_all` that raises errors of the device as DeviceError: others would fail, too.

    Lack of memory is a recording's own where another one had enough.
    """
    worked = False

    def stopping(sources: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        nonlocal worked
        try:
            for number, result in transcribe_all(sources):
                if isinstance(result, jax.errors.JaxRuntimeError) and not (worked and is_out_of_memory(result)):
                    raise result
                worked |= not isinstance(result, Exception)
                yield number, result
        except jax.errors.JaxRuntimeError as error:
            raise DeviceError(f"the device failed: {one_line(error)}") from error

    return stopping


def require_model(job: Job, model: Whisper) -> None:
    """Raises ValueError unless weights and tokenizer, also of a draft, are those with which the job was started."""
    _require_same(job, "model", digest(model))


def _with_lm(job: Job, model: Whisper, options: TranscribeChanges) -> TranscribeChanges:
    """Options with the language model in place of its path. Raises ValueError if the job was started with another."""
    if not isinstance(path := options.get("lm"), str | os.PathLike):
        return options
    lm = window_with_lm(tokenizer_of(model), DecodingOptions(lm=os.fspath(path))).lm
    _require_same(job, "lm", _digest(str(jax.tree_util.tree_structure(lm)), lm))
    return {**options, "lm": lm}


def _require_same(job: Job, name: str, own: str) -> None:
    """Notes a digest with which the job is started, or raises ValueError if there is another one."""
    path, what = job.folder / f"{name}.txt", {"lm": "language model"}.get(name, name)
    if not write_once(path, own) and (known := path.read_text(encoding="utf-8")) != own:
        raise ValueError(
            f"{job.folder} was started with another {what} (digest {known}, this one has {own}); use that one"
        )


def digest(model: Whisper) -> str:
    """Identifies a configuration, its tokenizer, and its weights in the dtype in which they are."""
    return _digest(f"{model.config!r} {model.tokenizer and model.tokenizer.digest}", nnx.state(model))


def _digest(about: str, arrays: Any) -> str:
    found = hashlib.sha256(about.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.asarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()[:32]

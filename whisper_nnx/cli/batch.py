"""The command `whisper-nnx batch`: transcribes any number of recordings into a folder, and continues where it ended."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from weight_loader.hub import check_name
from whisper_nnx import __version__
from whisper_nnx.cli.options import OPTIONS, SUBTITLE_FLAGS, Flag, add_option, as_flags, flag_of
from whisper_nnx.cli.parser import Help, Parser, parse_spelled
from whisper_nnx.cli.transcribe import check, check_devices, check_options, load_named_model, transcribe_options
from whisper_nnx.grammar.grammar import read_grammar
from whisper_nnx.jobs import changes, export, inputs, job, journal, status, supervise, worker
from whisper_nnx.output.progress import clock
from whisper_nnx.output.writers import WRITERS
from whisper_nnx.runtime.console import NAME, exit_status, run_command, say
from whisper_nnx.runtime.cores import reader_processes, usable_cores
from whisper_nnx.runtime.options import option, options_of
from whisper_nnx.runtime.startup import start
from whisper_nnx.transcription.options import NGRAM

_option = partial(option, scope="call", group="job")


@dataclass(frozen=True)
class BatchOptions:
    """Options of the command beside those of `transcribe`; only described, never made."""

    output: str | None = field(default=None, metadata=_option("folder of the job; created if missing", kind="folder"))
    output_format: str | None = field(
        default=None,
        metadata=_option(
            f"also write each finished shard into FOLDER/export: parquet, lhotse (cuts), {', '.join(WRITERS)}; "
            "srt,json: several"
        ),
    )
    workers: int | None = field(
        default=None, metadata=_option("processes on this machine (default: 1); with --ray, one per device of all")
    )
    ray: str | None = field(
        default=None, metadata=_option("run the workers on this Ray cluster: host:port, or auto for this machine's")
    )
    gpus_per_worker: float | None = field(
        default=None, metadata=_option("with --ray: 0.5 lets two workers share a GPU (default: 1 for each)")
    )
    shard_s: float | None = field(
        default=None,
        metadata=_option(
            f"audio in a shard, in s: what a worker takes at once (default: {job.SHARD_S:g}, "
            f"with batch_size=N at least {job.PER_ROW} N recordings; less in a small job, of which each of several "
            f"workers gets {job.PER_WORKER} shards)"
        ),
    )
    retry_failed: bool = field(
        default=False, metadata=_option("try the recordings that failed once more, for each reason")
    )
    retry_all: bool = field(
        default=False, metadata=_option("like retry_failed, also those that failed again for the same reason")
    )
    expires_s: float = field(
        default=worker.EXPIRES_S,
        metadata=_option("seconds of silence after which the shard of a worker on another machine is taken over"),
    )


_OWN = {flag.dest: flag for flag in map(flag_of, options_of(BatchOptions).values())}
_SUBTITLES = {flag.dest for flag in SUBTITLE_FLAGS}
_LEFT_OUT = {"detect_language", "progress", "fp16"}.union(flag.dest for flag in OPTIONS["input and output"])
_LEFT_OUT.remove("audio_track")
_SHARED = {title: [flag for flag in flags if flag.dest not in _LEFT_OUT] for title, flags in OPTIONS.items()}
# Options that change no result: each worker may have its own.
_OF_MACHINES = ("device", "devices", "mesh", "threads", "readers", "compilation_cache", "model_dir", "token")
_GPUS = Path("/proc/driver/nvidia/gpus")
_MODES = {
    "work": "Work on a job that is planned, beside other workers, on this machine or others that share its folder.",
    "status": "Show how far a job is.",
    "report": "Show what the transcripts of a job are like, as JSON.",
    "export": "Write the transcripts of a job, as far as it is done, in other formats.",
}


def build_parser(mode: str = "") -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{NAME} batch {mode}".strip(),
        usage=f"%(prog)s {'[options] FOLDER' if mode else 'INPUT --output FOLDER [options]'}",
        description=_MODES.get(mode)
        or "Transcribe recordings into FOLDER/results: of a folder, a pattern, a list, JSON lines, a tar or parquet. "
        "The same command continues a job that was interrupted. "
        "batch work, status, report and export take a job's folder.",
        formatter_class=Help,
        add_help=False,
    )
    group = parser.add_argument_group("job")
    if mode:
        group.add_argument("output", metavar="FOLDER", help="folder of the job")
    else:
        group.add_argument("input", metavar="INPUT", help="what is transcribed")
    for flag in _OWN.values():
        if not mode or (mode == "work" and flag.dest in ("workers", "ray", "gpus_per_worker", "expires_s")):
            add_option(group, flag, *(["-f"] if flag.dest == "output_format" else []))
    if mode in ("", "work"):
        group.add_argument("--worker_name", help=argparse.SUPPRESS)
        group.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the process that has started the worker
        known = [flag for flags in OPTIONS.values() for flag in flags if flag.dest not in _OWN]
        parser.set_defaults(**{flag.dest: flag.default for flag in known})
        for title, flags in _SHARED.items():
            if chosen := [flag for flag in flags if not mode or flag.dest in _OF_MACHINES]:
                group = parser.add_argument_group(title)
                for flag in chosen:
                    add_option(group, flag)
    if mode == "export":
        formats = f"parquet, lhotse (cuts), {', '.join(WRITERS)}; srt,json: several"
        group.add_argument("--output_format", "-f", required=True, metavar="FORMATS", help=formats)
        group.add_argument("--output_dir", "-o", metavar="FOLDER", help="where to write (default: FOLDER/export)")
        group = parser.add_argument_group("subtitles")
        for flag in SUBTITLE_FLAGS:
            add_option(group, flag)
    group = parser.add_argument_group("help")
    group.add_argument("--traceback", action="store_true", help="show where in the program an error happened")
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> exit status: 0, or 1 if a recording failed. Wrong usage raises SystemExit(2)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    mode = arguments[0] if arguments[:1] and arguments[0] in _MODES else ""
    run = {"": _run, "work": _work, "status": _status, "report": _report, "export": _export}[mode]
    return run_command(arguments[1:] if mode else arguments, build_parser(mode), parse_spelled, run, as_flags)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if not args.output:
        parser.error("--output FOLDER is required")
    _check_workers(parser, args)
    if args.shard_s is not None and not args.shard_s > 0:
        parser.error(f"--shard_s {args.shard_s:g} must be above 0")
    check(parser, argparse.Namespace(**vars(args) | {"output_format": "txt"}))  # the formats are checked below
    check_options(parser, args, transcribe_options(args))
    try:
        written = export.export_settings(args.output_format, _subtitle_options(args), vars(args))
    except ValueError as error:
        parser.error(as_flags(str(error)))
    for model in {args.model, args.draft} - {None, NGRAM}:
        check_name(model)
    for name in ("model", "draft", "lm", "tokenizer"):
        if (path := getattr(args, name)) is not None and os.path.exists(path):
            setattr(args, name, os.path.abspath(path))
    settings = {"input": inputs.absolute(args.input), **stored_options(args), **written}

    def plan(workers: int) -> job.Job:
        found = export.exportable(inputs.some_exist(inputs.read_input(args.input)), settings)
        is_new = not os.path.exists(os.path.join(args.output, "plan"))
        planned = job.plan(args.output, found, settings, args.shard_s, workers)
        if not is_new:
            changes.warn_of_changes(planned, args.input)
        if args.retry_failed or args.retry_all:
            left = journal.reopen_failed(planned, again=args.retry_all)
            if left:
                say(f"{left} failed again for the same reason, and stay failed; --retry_all tries them once more")
        return planned

    return _supervised(plan, args)


def _check_workers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    check_devices(parser, args)
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers {args.workers} must be at least 1")
    if not args.expires_s > 0:
        parser.error(f"--expires_s {args.expires_s:g} must be above 0")
    if args.ray and (args.devices or args.mesh or (args.device and args.device[1])):
        parser.error("with --ray each worker has one device, which Ray chooses; drop --devices, --mesh and --device N")
    if args.gpus_per_worker is not None:
        if not args.ray:
            parser.error("--gpus_per_worker has no effect without --ray")
        if not 0 < args.gpus_per_worker <= 1:
            parser.error(f"--gpus_per_worker {args.gpus_per_worker:g} must be above 0 and at most 1")
    if _has_own_gpus(args) and args.device[1]:
        parser.error(
            f"--device {args.device[0]}:{args.device[1]} is one device, but each of --workers {args.workers} has a GPU "
            "of its own; drop the number, or choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and _has_own_gpus(args) and (count := len(visible.split(","))) < args.workers:
        parser.error(f"--workers {args.workers}: each needs a GPU, but CUDA_VISIBLE_DEVICES={visible} has {count}")


def _has_own_gpus(args: argparse.Namespace) -> bool:
    """Whether each worker gets a GPU of its own: JAX takes most of the memory of all that it sees."""
    return not args.ray and (args.workers or 1) > 1 and args.device is not None and args.device[0] in ("gpu", "cuda")


def _own_gpu(args: argparse.Namespace, place: int) -> dict[str, str]:
    """The environment in which one of several workers sees a GPU of its own.

    Where no device is chosen, workers share GPUs if there are fewer, and nothing changes if there are none.
    """
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _has_own_gpus(args):
        return {"CUDA_VISIBLE_DEVICES": str(place) if known is None else known.split(",")[place]}
    gpus = [str(number) for number, _ in enumerate(_GPUS.glob("*"))] if known is None else known.split(",")
    if (args.workers or 1) == 1 or args.device or args.devices or args.mesh or gpus in ([], [""]):
        return {}
    return {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]}


def _supervised(plan: Callable[[int], job.Job], args: argparse.Namespace) -> int:
    """Runs the workers -> exit status: 1 if a worker or a recording failed. plan: plans the job for so many workers."""
    planned, ended = (_run_actors if args.ray else _run_processes)(plan, args)
    found = status.status(planned)
    say(_line(found))
    return ended or int(found.failed > 0 or found.shards_done < found.shards)


def _run_processes(plan: Callable[[int], job.Job], args: argparse.Namespace) -> tuple[job.Job, int]:
    planned = plan(workers := args.workers or 1)

    def start(name: str, place: int) -> supervise.Process:
        command = [sys.executable, "-m", "whisper_nnx", "batch", *_worker_arguments(planned, args, workers, name)]
        if os.name == "posix":  # elsewhere the parent may be a launcher of Python
            command.append(f"--parent={os.getpid()}")
        return supervise.Process(command, env=os.environ | _own_gpu(args, place))

    return planned, supervise.supervise(planned, start, workers, say)


def _run_actors(plan: Callable[[int], job.Job], args: argparse.Namespace) -> tuple[job.Job, int]:
    from whisper_nnx.jobs import cluster

    for name in ("model_dir", "compilation_cache"):  # actors have another working directory
        if isinstance(path := getattr(args, name), str):
            setattr(args, name, os.path.abspath(path))
    with cluster.connected(args.ray) as machines:
        count, resources = cluster.slots(machines, args.device and args.device[0], args.threads, args.gpus_per_worker)
        args.threads = resources.get("num_cpus", args.threads)
        planned = plan(workers := args.workers or count)

        def start(name: str, place: int) -> cluster.Actor:
            return cluster.Actor(main, _worker_arguments(planned, args, 1, name), resources)

        return planned, supervise.supervise(planned, start, workers, say)


def _worker_arguments(planned: job.Job, args: argparse.Namespace, workers: int, name: str) -> list[str]:
    """Of the command of one of several workers on a machine."""
    own = ["work", os.path.abspath(planned.folder), f"--worker_name={name}", f"--expires_s={args.expires_s}"]
    return own + _machine_flags(args, workers)


def _machine_flags(args: argparse.Namespace, workers: int) -> list[str]:
    """The options of machines for one of several workers, which share the cores."""
    flags: list[Flag] = [flag for group in _SHARED.values() for flag in group if flag.dest in _OF_MACHINES]
    values = {flag.dest: getattr(args, flag.dest) for flag in flags}
    if workers > 1:
        values["threads"] = values["threads"] or max(1, usable_cores() // workers)
        if values["readers"] is None and _own_gpu(args, 0):
            values["readers"] = reader_processes("gpu", workers)
    if values["device"] is not None:
        values["device"] = ":".join(map(str, values["device"]))
    if isinstance(values["mesh"], dict):
        values["mesh"] = ",".join(f"{axis}={size}" for axis, size in values["mesh"].items())
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def _work(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    planned = job.Job.open(args.output)
    if (version := planned.settings["version"]) != __version__:
        raise ValueError(f"{args.output} was planned by version {version}, not {__version__}; use that one")
    if "planned_by" in planned.settings:
        raise ValueError(f"{args.output} was planned in Python; continue it there, by the same call")
    if args.worker_name is None:
        _check_workers(parser, args)
        return _supervised(lambda workers: planned, args)
    try:
        if args.parent is not None:
            supervise.end_with(args.parent)
        return _as_worker(planned, parser, args)
    except KeyboardInterrupt as interrupt:  # the command that has started this worker reports it
        return exit_status(interrupt)


def _as_worker(planned: job.Job, parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if all(map(planned.is_done, range(planned.shards))):
        return 0
    full = restored_options(planned.settings)
    for name in _OF_MACHINES:
        setattr(full, name, getattr(args, name))
    device = start(args.threads, args.compilation_cache, args.device)
    import jax

    from whisper_nnx.jobs.in_process import work_with

    with jax.default_device(device):
        model = load_named_model(full.model, full, device)
        chosen: Any = transcribe_options(full)
        check_options(parser, full, chosen)
        chosen["verbose"] = None
        return work_with(lambda: model, planned, chosen, args.expires_s, args.worker_name)


def stored_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide the results, where they differ from the defaults; and the model. What JSON can hold."""
    left_out = _SUBTITLES.union(_OF_MACHINES)
    flags = (flag for group in _SHARED.values() for flag in group if flag.dest not in left_out)
    changed = {flag.dest: getattr(args, flag.dest) for flag in flags if getattr(args, flag.dest) != flag.default}
    if isinstance(grammar := changed.get("grammar"), Path):  # which other machines may not have
        changed["grammar"] = read_grammar(grammar)
    return changed | {"model": args.model}


def restored_options(settings: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments of the command from the settings of its job."""
    args = build_parser().parse_args(["-"])
    for name, value in settings.items():
        if name not in ("input", "version"):
            setattr(args, name, _hashable(value))
    return args


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _status(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    print(_line(status.status(job.Job.open(args.output))))
    return 0


def _line(found: status.Status) -> str:
    counted = (
        "{done} of {recordings} recordings done, {failed} failed, {left} left; "
        "{shards_done} of {shards} shards; {workers} workers"
    ).format(**asdict(found), left=found.recordings - found.done - found.failed)
    if found.speed is None or found.left_s is None:
        return counted
    return f"{counted}; {found.speed:.3g} s of audio a second, about {clock(found.left_s)} left"


def _report(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    print(json.dumps(status.report(job.Job.open(args.output)), indent=1, ensure_ascii=False))
    return 0


def _export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    done, folder = job.Job.open(args.output), args.output_dir or os.path.join(args.output, export.EXPORT)
    options = _subtitle_options(args)
    try:
        export.export_settings(args.output_format, options, done.settings)
    except ValueError as error:
        parser.error(as_flags(str(error)))
    count = export.export(done, folder, args.output_format, **options)
    say(f"{count} of {done.recordings} recordings are in {folder}")
    return 0


def _subtitle_options(args: argparse.Namespace) -> dict[str, Any]:
    return {flag.dest: value for flag in SUBTITLE_FLAGS if (value := getattr(args, flag.dest)) != flag.default}

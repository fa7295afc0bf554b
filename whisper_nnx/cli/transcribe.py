"""The command `whisper-nnx`: the options of openai-whisper's command under the same names, and further ones.

`python -m whisper_nnx.transcribe` is the same command. JAX is imported only when there is work to do.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_nnx.cli.inputs import Input, find_inputs, named, require_distinct, without_existing
from whisper_nnx.cli.options import (
    OPTIONS,
    SUBTITLE_FLAGS,
    TRANSCRIBE_FLAGS,
    VAD_FLAGS,
    Flag,
    add_option,
    as_flags,
)
from whisper_nnx.cli.parser import Help, Parser, Version, parse_spelled
from whisper_nnx.output.subtitles import SubtitleOptions
from whisper_nnx.output.writers import (
    TOKEN_FORMATS,
    WRITERS,
    format_timestamp,
    make_output_folder,
    parse_formats,
    write_files,
)
from whisper_nnx.runtime.console import (
    NAME,
    exit_status,
    interrupts_wait,
    one_line,
    report_error,
    run_command,
    say,
)
from whisper_nnx.runtime.startup import find_mesh, start
from whisper_nnx.transcription.fallback import temperature_ladder
from whisper_nnx.transcription.options import NGRAM, CallOptions, TranscribeOptions

if TYPE_CHECKING:
    import jax

    from whisper_nnx.model.whisper import Whisper
    from whisper_nnx.output.results import Transcript

PARTIAL = ".partial"  # suffix of the names of interrupted outputs
SHORT = {"--output_dir": ["-o"], "--output_format": ["-f"]}


def build_parser() -> argparse.ArgumentParser:
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # there is one after `python -m`
    parser = Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}"
        if spec and spec.name.startswith("whisper_nnx.")
        else NAME,
        usage="%(prog)s [options] audio [audio ...]",
        description="Turn speech into text and subtitles.",
        epilog="Option names may be written with hyphens too: --beam-size 5. A True or False may be left out: "
        "--word_timestamps is --word_timestamps True.",
        formatter_class=Help,
        add_help=False,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        if title == "input and output":
            text = (
                "files, folders of them, quoted patterns ('talks/*.mp3') or URLs; \"-\" is standard input, written as "
                "stdin.*"
            )
            group.add_argument("audio", nargs="+", help=text)
        for flag in options:
            add_option(group, flag, *SHORT.get(flag.name, []))
    group = parser.add_argument_group("help")
    group.add_argument("--traceback", action="store_true", help="show where in the program an error happened")
    group.add_argument("--version", action=Version, nargs=0, default=argparse.SUPPRESS, help="show it and leave")
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> exit status: 0, or 1 if anything failed. Wrong usage raises SystemExit(2)."""
    return run_command(argv, build_parser(), parse_spelled, _run, as_flags)


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    check(parser, args)
    options = transcribe_options(args)
    if not args.detect_language:
        make_output_folder(args.output_dir)
    check_options(parser, args, options)
    inputs, failed = _inputs(parser, args)
    if not inputs:
        return failed
    device = start(args.threads, args.compilation_cache, args.device)
    import jax

    with jax.default_device(device):
        model = load_named_model(args.model, args, device)
        run = _detect_languages if args.detect_language else _transcribe
        return run(model, inputs, args, options) or failed


def _inputs(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[list[Input], int]:
    """The inputs, and the exit status: 1 if a named one does not exist, which is reported."""
    inputs, problems = find_inputs(args.audio, args.recursive)
    formats = [name for name in args.audio if name.lower() in (*WRITERS, "all") and not os.path.exists(name)]
    if formats:
        several = ",".join(dict.fromkeys([*args.output_format.split(","), *formats]))
        parser.error(f"{formats[0]} is a format, not a file; separate several with commas: --output_format {several}")
    try:
        inputs = named(inputs, args.output_name)
        if not args.detect_language:
            require_distinct(inputs, args.output_format)
    except ValueError as error:
        parser.error(str(error))
    for problem in problems:
        say(one_line(problem))
    if args.skip_existing and not args.detect_language:
        missing = without_existing(inputs, args.output_format, args.output_dir)
        if skipped := len(inputs) - len(missing):
            say(f"{skipped} of {len(inputs)} skipped: all their outputs exist in {args.output_dir}")
        inputs = missing
    return inputs, 1 if problems else 0


def load_named_model(name: str, args: argparse.Namespace, device: jax.Device) -> Whisper:
    """Loads a model with the options of the command, and its draft as it."""
    from weight_loader import load_model
    from whisper_nnx.model.audio_context import with_audio_ctx
    from whisper_nnx.model.masked_heads import with_masked_heads
    from whisper_nnx.transcription.drafts import with_draft

    dtype = _choose_dtype(args.dtype, getattr(args, "fp16", None), device.platform)
    where = {"cache_dir": args.model_dir, "revision": args.revision, "token": args.token}
    if (mesh := find_mesh(args.mesh or args.devices, device)) is not None:
        where["mesh"] = mesh
    small = {"weights": args.weights, "kv_cache_dtype": args.kv_cache_dtype}
    model = load_model(name, dtype=dtype, tokenizer=args.tokenizer, **small, **where)
    if args.audio_ctx:
        model = with_audio_ctx(model, args.audio_ctx)
    model = with_masked_heads(model, args.masked_heads)
    if args.draft in (None, NGRAM):
        return with_draft(model, args.draft)
    own = argparse.Namespace(**{**vars(args), "draft": None, "revision": None, "masked_heads": None})
    return with_draft(model, load_named_model(args.draft, own, device))


def transcribe_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `transcribe` that differ from its defaults, with the ladder of temperatures.

    Without the draft, which `load_named_model` loads.
    """
    options = _changed(args, [flag for flag in TRANSCRIBE_FLAGS if flag.dest != "draft"])
    if vad_parameters := _changed(args, VAD_FLAGS):
        options["vad_parameters"] = vad_parameters
    options["temperature"] = temperature_ladder(args.temperature, args.temperature_increment_on_fallback)
    return options


def _changed(args: argparse.Namespace, flags: list[Flag]) -> dict[str, Any]:
    values = {flag.option: getattr(args, flag.dest) for flag in flags}
    return {one.name: value for one, value in values.items() if value not in (one.default, one.unset)}


def _transcribe(model: Whisper, inputs: Sequence[Input], args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Transcribes all files, writing each when it is done, even if others fail -> exit status."""
    from whisper_nnx.transcription.stream import iter_transcripts

    results = iter_transcripts(model, [one.path for one in inputs], **options)
    status, done = 0, set()
    try:
        for number, result in results:
            with interrupts_wait():  # until all files of this recording are written
                try:
                    if isinstance(result, Exception):
                        raise result
                    if not args.verbose and number in results.empty:  # else the report has printed it
                        warnings.warn(f"{_name(inputs[number])}: no text: {results.empty[number]}", stacklevel=2)
                    _write(result, inputs[number].stem, args)
                except Exception as error:
                    report_error(error, _name(inputs[number]), args.traceback, as_flags)
                    status = 1
                done.add(number)
    except KeyboardInterrupt as interrupt:
        unfinished = {number: part for number, part in results.unfinished().items() if number not in done}
        _keep_partial(unfinished, inputs, args)
        return exit_status(interrupt)
    return status


def _write(result: Any, stem: str, args: argparse.Namespace) -> list[Path]:
    return write_files(result, Path(args.output_dir) / stem, args.output_format, **_changed(args, SUBTITLE_FLAGS))


def _keep_partial(unfinished: dict[int, Transcript], inputs: Sequence[Input], args: argparse.Namespace) -> None:
    """After an interruption: writes the partial transcripts, or names the option that would."""
    if not unfinished:
        say("interrupted")
    for number, result in unfinished.items():
        name, end = _name(inputs[number]), format_timestamp(result["segments"][-1]["end"])
        if not args.keep_partial:
            say(f"interrupted: what was transcribed of {name}, up to {end}, is lost; --keep_partial would write it")
            continue
        try:
            files = _write(result, inputs[number].stem + PARTIAL, args)
            say(f"interrupted: what was transcribed of {name}, up to {end}, is in {', '.join(map(str, files))}")
        except Exception as error:
            report_error(error, name, args.traceback, as_flags)


def _detect_languages(
    model: Whisper, inputs: Sequence[Input], args: argparse.Namespace, options: dict[str, Any]
) -> int:
    """Prints the language of each recording -> exit status."""
    from whisper_nnx.text.languages import LANGUAGES
    from whisper_nnx.transcription.opening import open_recording

    chosen = TranscribeOptions.of(**CallOptions.split(options)[1])
    status = 0
    for one in inputs:
        try:
            opened = open_recording(model, one.path, chosen)
            if not opened.language_probs:
                raise ValueError("this model is English-only and cannot detect languages; choose a multilingual one")
            code = opened.language
            name = LANGUAGES.get(code, code).title()
            print(f"{one.path}: {code} ({name}), {opened.language_probs[code]:.0%}", flush=True)
        except Exception as error:
            report_error(error, _name(one), args.traceback, as_flags)
            status = 1
    return status


def _name(one: Input) -> str:
    return "standard input" if one.path == "-" else one.path


def _choose_dtype(dtype: str | None, fp16: bool | None, platform: str) -> str | None:
    """None: the default of `load_model` on this device."""
    if dtype is None and fp16 and platform == "cpu":
        warnings.warn("float16 is slow on the CPU; using float32 (--dtype float16 insists)", stacklevel=2)
        return "float32"
    if dtype is None and fp16 is not None:
        return "float16" if fp16 else "float32"
    return dtype


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options that exclude or need each other."""
    for flag in VAD_FLAGS:
        if getattr(args, flag.dest) is not None and not args.vad_filter:
            parser.error(f"{flag.name} requires --vad_filter True")
    for flag in SUBTITLE_FLAGS:
        needed = "token_timestamps" if flag.dest == "max_len" and not args.split_on_word else "word_timestamps"
        if getattr(args, flag.dest) and not getattr(args, needed):
            parser.error(f"{flag.name} requires --{needed} True")
    for name in TOKEN_FORMATS:
        if name in parse_formats(args.output_format) and not args.token_timestamps:
            parser.error(f"--output_format {name} requires --token_timestamps True")
    for name in ("print_colors", "print_special"):
        if getattr(args, name) and not args.verbose:
            parser.error(f"--{name} changes what --verbose True prints, but it is {args.verbose}")
    if args.print_colors and args.print_special:
        parser.error("--print_colors and --print_special show a text in two ways; drop one of the two")
    check_devices(parser, args)
    if args.fp16 is not None and args.dtype not in (None, "float16" if args.fp16 else "float32"):
        parser.error(f"--fp16 {args.fp16} contradicts --dtype {args.dtype}; drop one of the two")
    if args.temperature_increment_on_fallback is not None and not args.temperature_increment_on_fallback > 0:
        parser.error("--temperature_increment_on_fallback must be above 0, or None to try one temperature only")
    if args.max_line_count and not args.max_line_width:
        warnings.warn("--max_line_count has no effect without --max_line_width", stacklevel=2)
    if args.max_words_per_line and args.max_line_width and args.max_line_count:
        warnings.warn("--max_words_per_line has no effect with the other two limits", stacklevel=2)
    if getattr(args, "audio", None) and args.detect_language and args.language is not None:
        parser.error(f"--detect_language True and --language {args.language} exclude each other; drop one of the two")


def check_devices(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuses options of devices that exclude each other."""
    if args.devices is not None and args.mesh is not None:
        parser.error("--devices and --mesh both choose the devices; drop one of the two")
    if args.device is not None and args.device[1] and (args.devices or args.mesh):
        parser.error(f"--device {args.device[0]}:{args.device[1]} is one device; drop it, or --devices and --mesh")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Refuses what `transcribe` and the writers would refuse, before the model is loaded."""
    try:
        if "alignment_heads" in options:
            from whisper_nnx.model.heads import parse_heads

            options["alignment_heads"] = parse_heads(options["alignment_heads"])
        SubtitleOptions(**_changed(args, SUBTITLE_FLAGS))
        with warnings.catch_warnings(action="ignore"):  # they are issued again later
            chosen = TranscribeOptions.of(**CallOptions.split(options)[1])
            CallOptions(draft=args.draft and NGRAM).check(chosen)
    except ValueError as error:
        parser.error(as_flags(one_line(error)))

"""The command `whisper-nnx`: the options of openai-whisper's command under the same names, and some of our own.

`python -m whisper_nnx.transcribe` is the same command. JAX is imported only when there is work to do.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import textwrap
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from whisper_nnx.allocator import keep_memory
from whisper_nnx.cli_options import (
    DRIVER_OPTIONS,
    OPTIONS,
    OWN_OPTIONS,
    OWN_TRANSCRIBE_OPTIONS,
    SUBTITLE_OPTIONS,
    TRANSCRIBE_OPTIONS,
    VAD,
    VAD_OPTIONS,
)
from whisper_nnx.subtitles import SubtitleOptions
from whisper_nnx.writers import get_writer, make_output_folder, output_files, parse_formats

if TYPE_CHECKING:
    import jax

    from whisper_nnx.model import Whisper
    from whisper_nnx.results import Transcript

NAME = "whisper-nnx"
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells have it
DEFAULT_DTYPE = {"cpu": "float32", "gpu": "float16", "tpu": "bfloat16"}
SHORT = {"--output_dir": ["-o"], "--output_format": ["-f"]}


def build_parser() -> argparse.ArgumentParser:
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # there is one after `python -m`
    parser = Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}"
        if spec and spec.name.startswith("whisper_nnx.")
        else NAME,
        usage="%(prog)s [options] audio [audio ...]",
        description="Turn speech into text and subtitles.",
        epilog="Option names may be written with hyphens too: --beam-size 5.",
        formatter_class=Help,
        add_help=False,
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        if title == "input and output":
            group.add_argument("audio", nargs="+", help='sound or video files; "-" is standard input and makes stdin.*')
        for name, kind, default, text in options:
            group.add_argument(name, *SHORT.get(name, []), **kind, default=default, help=text)
    group = parser.add_argument_group("help")
    group.add_argument("--traceback", action="store_true", help="show where in the program an error happened")
    group.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show it and leave")
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    return parser


class Parser(argparse.ArgumentParser):
    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """The options that begin so: openai-whisper's alone, where there are any. What is short there is short here."""
        found = super()._get_option_tuples(option_string)
        return [option for option in found if option[1].removeprefix("--") not in OWN_OPTIONS] or found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message} ({self.prog} --help lists the options)\n")


class Help(argparse.HelpFormatter):
    """Shows defaults, but not those that only mean "not given"."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.option_strings and action.default not in (None, argparse.SUPPRESS) and action.nargs != 0
        return f"{action.help} (default: %(default)s)" if shown else action.help or ""


class _Version(argparse.Action):
    """As argparse's own, but looks the versions up only when they are asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        from whisper_nnx import __version__

        print(f"{NAME} {__version__} (jax {version('jax')}, flax {version('flax')})")
        parser.exit()


def with_underscores(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
    """`--beam-size=5` -> `--beam_size=5`. Only the names of options change, and nothing after `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = [option for option in parser._option_string_actions if option.startswith("--")]

    def spell(argument: str) -> str:
        name, equals, value = argument.partition("=")
        spelled = f"--{name[2:].replace('-', '_')}"
        is_option = name.startswith("--") and any(option.startswith(spelled) for option in options)  # or its beginning
        return f"{spelled}{equals}{value}" if is_option else argument

    return [*map(spell, arguments[:end]), *arguments[end:]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command -> its exit status: 0; 1 if a file, or all, failed. Wrong usage raises SystemExit(2)."""
    parser = build_parser()
    args = parser.parse_args(with_underscores(sys.argv[1:] if argv is None else argv, parser))
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without the transcript's letters shows "?" for them
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        with plain_warnings():
            check(parser, args)
            return _run(parser, args)
    except KeyboardInterrupt:
        print(f"{NAME}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read our output has left; Python would complain again when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    # XLA counts its threads when it starts. On some processors it complains about each program from the compilation
    # cache, which then runs all the same (openxla/xla#44565): only fatal errors are shown, the others are exceptions.
    if args.threads:
        os.environ["PJRT_NPROC"] = str(args.threads)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    options = transcribe_options(parser, args)
    try:
        make_output_folder(args.output_dir)
        options["temperature"] = temperature_ladder(args.temperature, args.temperature_increment_on_fallback)
        check_options(parser, args, options)
        keep_memory()
        import jax

        from whisper_nnx.compilation_cache import choose_compilation_cache
        from whisper_nnx.programs import keep_programs

        try:
            keep_programs(choose_compilation_cache(args.compilation_cache))
        except PermissionError as error:  # a folder of JAX's own setting, which nothing here has checked
            warnings.warn(f"programs are not kept: {error}; choose another --compilation_cache", stacklevel=1)
        device = find_device(args.device)
        with jax.default_device(device):
            model = model_of(args, device)
            return _transcribe_files(model, args, options)
    except BrokenPipeError:
        raise
    except Exception as error:
        report_error(error, "error", args.traceback)
        return 1


def model_of(args: argparse.Namespace, device: jax.Device) -> Whisper:
    from weight_loader import load_model

    dtype = _choose_dtype(args.dtype, args.fp16, device.platform)
    where = {"cache_dir": args.model_dir, "revision": args.revision, "token": args.token}
    return load_model(args.model, dtype=dtype, weights=args.weights, tokenizer=args.tokenizer, **where)


def transcribe_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `transcribe`, without the temperatures; of our own options, those that were set."""
    set_ = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    options = {name: getattr(args, name) for name in TRANSCRIBE_OPTIONS}
    options |= {name: set_[name] for name in OWN_TRANSCRIBE_OPTIONS if name in set_}
    if vad_parameters := {name.removeprefix(VAD): value for name, value in set_.items() if name in VAD_OPTIONS}:
        options["vad_parameters"] = vad_parameters
    return options


def _transcribe_files(model: Whisper, args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Every file, even after one that fails -> exit status. What is written of each is written when it is done."""
    write = get_writer(args.output_format, args.output_dir)
    subtitle_options = {name: getattr(args, name) for name in SUBTITLE_OPTIONS}
    status = 0
    for audio, result in _transcripts(model, args, options):
        try:
            if isinstance(result, Exception):
                raise result
            write(result, audio, **subtitle_options)
        except BrokenPipeError:
            raise
        except Exception as error:
            report_error(error, "standard input" if audio == "-" else audio, args.traceback)
            status = 1
    return status


def _transcripts(
    model: Whisper, args: argparse.Namespace, options: dict[str, Any]
) -> Iterator[tuple[str, Transcript | Exception]]:
    """(a file, what was said in it or why that is not known): together, as they are done, or one after the other."""
    from whisper_nnx.transcribe import iter_transcripts, transcribe

    if args.batch_size > 1 and len(args.audio) > 1:
        for number, result in iter_transcripts(model, args.audio, **options):
            yield args.audio[number], result
        return
    for audio in args.audio:
        try:
            one: Transcript | Exception = transcribe(model, audio, **options)
        except Exception as error:
            one = error
        yield audio, one


def find_device(wanted: tuple[str, int] | None) -> jax.Device:
    """ValueError where this machine has no such device."""
    import jax

    if wanted is None:
        return jax.devices()[0]
    platform, index = wanted
    if platform == "cpu":  # else JAX would take hold of the GPU's memory too
        jax.config.update("jax_platforms", "cpu")
    try:
        return jax.devices(platform)[index]
    except (RuntimeError, IndexError):
        found = ", ".join(f"{device.platform}:{i}" for i, device in enumerate(jax.devices()))
        raise ValueError(f"there is no device {platform}:{index}, but {found}; choose one with --device") from None


def _choose_dtype(dtype: str | None, fp16: bool | None, platform: str) -> str:
    if dtype is None and fp16 and platform == "cpu":
        warnings.warn("float16 is slow on the CPU; using float32 (--dtype float16 insists)", stacklevel=2)
        return "float32"
    if dtype is None and fp16 is not None:
        return "float16" if fp16 else "float32"
    return dtype or DEFAULT_DTYPE.get(platform, "float32")


def temperature_ladder(first: float, increment: float | None) -> tuple[float, ...]:
    """The ladder of temperatures up to 1, in the reference's very numbers."""
    import numpy as np

    steps = [] if increment is None or not math.isfinite(first) else np.arange(first, 1.0 + 1e-6, increment).tolist()
    return tuple(steps) or (first,)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that exclude or need each other, and files whose outputs would overwrite each other's."""
    for name in SUBTITLE_OPTIONS:
        needed = "token_timestamps" if name == "max_len" and not args.split_on_word else "word_timestamps"
        if getattr(args, name) and not getattr(args, needed):
            parser.error(f"--{name} requires --{needed} True")
    if "json_full" in parse_formats(args.output_format) and not args.token_timestamps:
        parser.error("--output_format json_full requires --token_timestamps True")
    if args.print_colors and not args.verbose:
        parser.error(f"--print_colors colours what --verbose True prints, but it is {args.verbose}")
    if args.fp16 is not None and args.dtype not in (None, "float16" if args.fp16 else "float32"):
        parser.error(f"--fp16 {args.fp16} contradicts --dtype {args.dtype}; drop one of the two")
    if args.temperature_increment_on_fallback is not None and not args.temperature_increment_on_fallback > 0:
        parser.error("--temperature_increment_on_fallback must be above 0, or None to try one temperature only")
    if args.max_line_count and not args.max_line_width:
        warnings.warn("--max_line_count has no effect without --max_line_width", stacklevel=2)
    if args.max_words_per_line and args.max_line_width and args.max_line_count:
        warnings.warn("--max_words_per_line has no effect with the other two limits", stacklevel=2)
    files_of = defaultdict(list)
    for audio in args.audio:
        for output in output_files(audio, args.output_format):
            files_of[os.path.normcase(output)].append(audio)
    for output, files in files_of.items():
        if len(files) > 1:
            parser.error(f"{' and '.join(files)} would all be written to {output}; rename them, or run once for each")


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Refuses what `transcribe` and the writers would refuse, before a large model is loaded."""
    from whisper_nnx.options import TranscribeOptions

    try:
        if "alignment_heads" in options:
            from whisper_nnx.timing import parse_heads

            options["alignment_heads"] = parse_heads(options["alignment_heads"])
        SubtitleOptions(**{name: getattr(args, name) for name in SUBTITLE_OPTIONS})
        with warnings.catch_warnings(action="ignore"):  # they come again
            TranscribeOptions.of(**{name: value for name, value in options.items() if name not in DRIVER_OPTIONS})
    except (ValueError, ImportError) as error:  # the latter: vad_filter without its package
        parser.error(one_line(error))


def report_error(error: Exception, subject: str, with_traceback: bool) -> None:
    """One line for what users bring about, and one with the way to more for what looks like a defect of ours."""
    if with_traceback:
        traceback.print_exception(error)
    message = one_line(error)
    if not isinstance(error, ValueError | OSError):
        hint = "" if with_traceback else " (unexpected: --traceback shows where it happened)"
        message = f"{type(error).__name__}: {message}{hint}"
    if not message.startswith((f"{subject}:", f"{subject} ")):
        message = f"{subject}: {message}"
    print(f"{NAME}: {message}", file=sys.stderr)


def one_line(error: Exception | Warning | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return textwrap.shorten(str(error), 1000, placeholder=" ...") or "no message"


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows warnings as one line each."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"{NAME}: warning: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield

"""The command `whisper-nnx`: the options of openai-whisper's command under the same names, and some of our own.

`python -m whisper_nnx.transcribe` is the same command. JAX is imported only when there is work to do.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from whisper_nnx.words import APPENDED, PREPENDED
from whisper_nnx.writers import WRITERS, get_writer, make_output_folder, output_name

if TYPE_CHECKING:
    import jax

    from whisper_nnx.model import Whisper

T = TypeVar("T")

NAME = "whisper-nnx"
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + the signal's number, as shells have it
DEFAULT_DTYPE = {"cpu": "float32", "gpu": "float16", "tpu": "bfloat16"}
# Options that go to `transcribe`, and those that go to the writers, under their own names.
TRANSCRIBE_OPTIONS = (
    *("verbose", "task", "language", "best_of", "beam_size", "patience", "length_penalty", "suppress_tokens"),
    *("initial_prompt", "carry_initial_prompt", "condition_on_previous_text", "compression_ratio_threshold"),
    *("logprob_threshold", "no_speech_threshold", "word_timestamps", "prepend_punctuations", "append_punctuations"),
    *("clip_timestamps", "hallucination_silence_threshold"),
)
SUBTITLE_OPTIONS = ("highlight_words", "max_line_count", "max_line_width", "max_words_per_line")


def _optional(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    def parse_unless_none(text: str) -> T | None:
        return None if text.lower() == "none" else parse(text)

    parse_unless_none.__name__ = parse.__name__  # argparse shows it: invalid int value
    return parse_unless_none


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _cache(text: str) -> bool | str:
    return {"true": True, "false": False, "none": False}.get(text.lower(), text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _language(text: str) -> str:
    from whisper_nnx.languages import to_language_code

    try:
        return to_language_code(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _device(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(cpu|gpu|cuda|tpu)(?::(\d+))?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device; give cpu, gpu, cuda or tpu, with an index as in gpu:1"
        )
    return match[1], int(match[2] or 0)


def _kind(parse: Callable[[str], Any], metavar: str | None, **more: Any) -> dict[str, Any]:
    return {"type": parse, "metavar": metavar, **more}


FLAG = _kind(_boolean, "{True,False}")
NUMBER, NUMBER_OR_NONE = _kind(float, "X"), _kind(_optional(float), "X")
WHOLE_OR_NONE, COUNT_OR_NONE = _kind(_optional(int), "N"), _kind(_optional(_count), "N")
TEXT, FOLDER = _kind(str, "TEXT"), _kind(str, "FOLDER")
TASK = _kind(str, None, choices=["transcribe", "translate"])
DTYPE = _kind(str, None, choices=["float32", "bfloat16", "float16"])

# Group -> options, each with its kind, default and help. The order is that of --help.
OPTIONS: dict[str, list[tuple[str, dict[str, Any], Any, str]]] = {
    "model": [
        ("--model", _kind(str, "NAME"), "turbo", "tiny, base.en, large-v3, turbo ...; a repository; a folder"),
        ("--model_dir", FOLDER, None, "where downloads are kept (default: Hugging Face's cache)"),
        ("--revision", TEXT, None, "branch, tag or commit of the repository"),
        ("--token", TEXT, None, "for private repositories; better kept in the environment, as HF_TOKEN"),
    ],
    "task": [
        ("--task", TASK, "transcribe", "write what is said, or its translation to English"),
        ("--language", _kind(_optional(_language), "NAME"), None, "what is spoken: de, German (default: detect it)"),
    ],
    "decoding": [
        ("--temperature", NUMBER, 0.0, "0 takes the most probable words, more samples them"),
        ("--best_of", WHOLE_OR_NONE, 5, "samples of which the best is kept, at temperatures above 0"),
        ("--beam_size", WHOLE_OR_NONE, 5, "beams of the search, at temperature 0; None is greedy"),
        ("--patience", NUMBER_OR_NONE, None, "finished beams to wait for, times beam_size (default: 1.0)"),
        ("--length_penalty", NUMBER_OR_NONE, None, "alpha, from 0 to 1 (default: divide by the length)"),
        ("--suppress_tokens", _kind(_optional(str), "IDS"), "-1", "tokens never to write: 1,2,3; -1 is most symbols"),
    ],
    "long recordings": [
        ("--initial_prompt", TEXT, None, "what may have been said before: names, spelling, style"),
        ("--carry_initial_prompt", FLAG, False, "put it before every window, not the first alone"),
        ("--condition_on_previous_text", FLAG, True, "tell each window what those before it said"),
        ("--temperature_increment_on_fallback", NUMBER_OR_NONE, 0.2, "added for each new try, up to 1; None: one try"),
        ("--compression_ratio_threshold", NUMBER_OR_NONE, 2.4, "try again if text repeats itself: compresses better"),
        ("--logprob_threshold", NUMBER_OR_NONE, -1.0, "try again if the average token is less probable"),
        ("--no_speech_threshold", NUMBER_OR_NONE, 0.6, "improbable text is silence if that is more probable"),
        ("--clip_timestamps", TEXT, "0", "what to transcribe, in seconds: start,end,start,end,..."),
    ],
    "word timestamps": [
        ("--word_timestamps", FLAG, False, "time every word, and refine the segments by it"),
        ("--prepend_punctuations", TEXT, PREPENDED, "marks that belong to the word after them"),
        ("--append_punctuations", TEXT, APPENDED, "marks that belong to the word before them"),
        ("--hallucination_silence_threshold", NUMBER_OR_NONE, None, "skip longer silence, in s, beside invented text"),
    ],
    "subtitles (vtt and srt; these need --word_timestamps True)": [
        ("--highlight_words", FLAG, False, "underline each word while it is spoken"),
        ("--max_line_width", COUNT_OR_NONE, None, "characters of a line (default: no limit)"),
        ("--max_line_count", COUNT_OR_NONE, None, "lines of a subtitle; needs --max_line_width (default: no limit)"),
        ("--max_words_per_line", COUNT_OR_NONE, None, "words of a subtitle, instead of these two (default: no limit)"),
    ],
    "performance": [
        ("--device", _kind(_device, "NAME"), None, "cpu, gpu, cuda, tpu; gpu:1 is the second (default: the fastest)"),
        ("--dtype", DTYPE, None, "of the computation (default: float32 on CPUs, float16 on GPUs, bfloat16 on TPUs)"),
        ("--fp16", FLAG, None, "True is --dtype float16 (on CPUs float32 all the same), False is --dtype float32"),
        ("--threads", COUNT_OR_NONE, 0, "of the CPU; 0: one per core"),
        ("--compilation_cache", _kind(_cache, "WHERE"), True, "keep compiled programs: True, False, or in this folder"),
    ],
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # there is one after `python -m`
    parser = _Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}"
        if spec and spec.name.startswith("whisper_nnx.")
        else NAME,
        usage="%(prog)s [options] audio [audio ...]",
        description="Turn speech into text and subtitles.",
        epilog="Option names may be written with hyphens too: --beam-size 5.",
        formatter_class=_Help,
        add_help=False,
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("audio", nargs="+", help='sound or video files; "-" is standard input and makes stdin.*')
    group.add_argument("--output_dir", "-o", **FOLDER, default=".", help="where to write; made if missing")
    group.add_argument("--output_format", "-f", choices=[*WRITERS, "all"], default="all", help="what to write")
    verbose = "print the text as it comes (True), show a progress bar (False), or neither (None)"
    group.add_argument("--verbose", type=_optional(_boolean), metavar="{True,False,None}", default=True, help=verbose)
    group.add_argument("--traceback", action="store_true", help="show where in the program an error happened")
    group.add_argument("--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show it and leave")
    group.add_argument("--help", "-h", action="help", help="show this and leave")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for name, kind, default, text in options:
            group.add_argument(name, **kind, default=default, help=text)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{NAME}: error: {message} ({self.prog} --help lists the options)\n")


class _Help(argparse.HelpFormatter):
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


def _with_underscores(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[str]:
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
    args = parser.parse_args(_with_underscores(sys.argv[1:] if argv is None else argv, parser))
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without the transcript's letters shows "?" for them
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        with _plain_warnings():
            _check(parser, args)
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
    options = {name: getattr(args, name) for name in TRANSCRIBE_OPTIONS}
    try:
        make_output_folder(args.output_dir)
        options["temperature"] = _temperatures(args.temperature, args.temperature_increment_on_fallback)
        _check_options(parser, options)
        import jax

        if args.compilation_cache is False:
            jax.config.update("jax_enable_compilation_cache", False)
        else:
            from whisper_nnx.compilation_cache import enable_compilation_cache

            enable_compilation_cache(None if args.compilation_cache is True else args.compilation_cache)
        device = _find_device(args.device)
        with jax.default_device(device):
            model = _load_model(args, device)
            return _transcribe_files(model, args, options)
    except BrokenPipeError:
        raise
    except Exception as error:
        _report(error, "error", args.traceback)
        return 1


def _load_model(args: argparse.Namespace, device: jax.Device) -> Whisper:
    from weight_loader import load_model

    dtype = _choose_dtype(args.dtype, args.fp16, device.platform)
    return load_model(args.model, dtype=dtype, cache_dir=args.model_dir, revision=args.revision, token=args.token)


def _transcribe_files(model: Whisper, args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Every file, even after one that fails -> exit status."""
    from whisper_nnx.transcribe import transcribe

    write = get_writer(args.output_format, args.output_dir)
    subtitle_options = {name: getattr(args, name) for name in SUBTITLE_OPTIONS}
    status = 0
    for audio in args.audio:
        try:
            write(transcribe(model, audio, **options), audio, **subtitle_options)
        except BrokenPipeError:
            raise
        except Exception as error:
            _report(error, "standard input" if audio == "-" else audio, args.traceback)
            status = 1
    return status


def _find_device(wanted: tuple[str, int] | None) -> jax.Device:
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


def _temperatures(first: float, increment: float | None) -> tuple[float, ...]:
    """The ladder of temperatures up to 1, in the reference's very numbers."""
    import numpy as np

    steps = [] if increment is None or not math.isfinite(first) else np.arange(first, 1.0 + 1e-6, increment).tolist()
    return tuple(steps) or (first,)


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Options that exclude or need each other, and files whose outputs would overwrite each other's."""
    if not args.word_timestamps and (given := [name for name in SUBTITLE_OPTIONS if getattr(args, name)]):
        parser.error(f"--{given[0]} requires --word_timestamps True")
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
        files_of[os.path.normcase(output_name(audio))].append(audio)
    for name, files in files_of.items():
        if len(files) > 1:
            parser.error(f"{' and '.join(files)} would all be written to {name}.*; rename them, or run once for each")


def _check_options(parser: argparse.ArgumentParser, options: dict[str, Any]) -> None:
    """Refuses what `transcribe` would refuse, before a large model is loaded."""
    from whisper_nnx.decoding.options import DecodingOptions
    from whisper_nnx.fallback import FallbackOptions
    from whisper_nnx.longform import LongformOptions

    def given(options_type: type) -> dict[str, Any]:
        return {field.name: options[field.name] for field in fields(options_type) if field.name in options}

    try:
        LongformOptions(**given(LongformOptions))
        FallbackOptions(options["temperature"], **given(FallbackOptions))
        window_options = given(DecodingOptions)
        for name in ("temperature", "beam_size", "patience", "best_of"):  # FallbackOptions' business
            del window_options[name]
        DecodingOptions(**window_options)
    except ValueError as error:
        parser.error(_one_line(error))


def _report(error: Exception, subject: str, with_traceback: bool) -> None:
    """One line for what users bring about, and one with the way to more for what looks like a defect of ours."""
    if with_traceback:
        traceback.print_exception(error)
    message = _one_line(error)
    if not isinstance(error, ValueError | OSError):
        hint = "" if with_traceback else " (unexpected: --traceback shows where it happened)"
        message = f"{type(error).__name__}: {message}{hint}"
    if not message.startswith((f"{subject}:", f"{subject} ")):
        message = f"{subject}: {message}"
    print(f"{NAME}: {message}", file=sys.stderr)


def _one_line(error: Exception | Warning | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return textwrap.shorten(str(error), 1000, placeholder=" ...") or "no message"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Shows warnings as one line each."""

    def show(message: Warning | str, *_: Any) -> None:
        print(f"{NAME}: warning: {_one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield

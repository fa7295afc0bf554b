"""The options of the command `whisper-nnx`: those of the options classes, taken from their fields, and its own."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from whisper_nnx.audio.options import VadOptions
from whisper_nnx.output.subtitles import SubtitleOptions
from whisper_nnx.output.writers import WRITERS, parse_formats
from whisper_nnx.runtime.files import read_regular
from whisper_nnx.runtime.options import Option, option, options_of
from whisper_nnx.transcription.option_values import KINDS as VALUES
from whisper_nnx.transcription.option_values import how, kind_of
from whisper_nnx.transcription.options import RECORDING, CallOptions

_LONGEST_LIST = 4 * 2**20  # bytes of a file of phrases


def _cache(text: str) -> bool | str:
    return {"true": True, "false": False, "none": False}.get(text.lower(), text)


def _formats(text: str) -> str:
    try:
        parse_formats(text)
    except ValueError as error:
        hint = "; files need no option, -f is --output_format" if os.path.exists(text) else ""
        raise argparse.ArgumentTypeError(f"{str(error).removeprefix('format=')}{hint}") from None
    return text


def _phrases(text: str) -> Any:
    """Of a file, where there is one of this name, or of the text itself."""
    if os.path.isfile(text):
        try:
            text = read_regular(Path(text), _LONGEST_LIST).decode() + "\n"
        except (OSError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{text!r} cannot be read as UTF-8 text: {error}") from None
    return VALUES["phrases"]["type"](text)


def _device(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(cpu|gpu|cuda|tpu)(?::(\d+))?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a device; give cpu, gpu, cuda or tpu, optionally with an index, such as gpu:1"
        )
    return match[1], int(match[2] or 0)


def _grammar(text: str) -> str | Path:
    """The path of a file if there is one, as in whisper.cpp; else a grammar itself."""
    return Path(text) if os.path.isfile(text) else text


def _devices(text: str) -> int | str:
    if text.lower() == "all":
        return "all"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of devices; give all, or 1 or more")
    return int(text)


def _mesh(text: str) -> dict[str, int]:
    axes = [re.fullmatch(r"(data|model)=([1-9]\d{0,5})", part.strip()) for part in text.split(",")]
    found = {axis[1]: int(axis[2]) for axis in axes if axis}
    if len(found) < len(axes):
        raise argparse.ArgumentTypeError(f"{text!r} is not a mesh; give the size of its axes, such as data=4,model=2")
    return {"data": 1, "model": 1, **found}


FLOATS = ["float32", "bfloat16", "float16"]
# Kind of value -> arguments of argparse's `add_argument`: the shared ones, and the command's own.
KINDS = {
    **VALUES,
    "grammar": how(_grammar, "FILE"),
    "lm": how(str, "FILE"),
    "folder": how(str, "FOLDER"),
    "name": how(str, "NAME"),
    "formats": how(_formats, "FORMATS"),
    "phrases": how(_phrases, "WORDS"),
    "device": how(_device, "NAME"),
    "devices": how(_devices, "N"),
    "mesh": how(_mesh, "AXES"),
    "dtype": how(str, None, choices=FLOATS),
    "weights": how(str, None, choices=[*FLOATS, "int8"]),
    "kv_cache_dtype": how(str, None, choices=["int8"]),
    "cache": how(_cache, "WHERE"),
}

_files = partial(option, scope="output", group="input and output", evaluate=False)
_model = partial(option, scope="call", group="model")
_machine = partial(option, scope="call", group="performance")


@dataclass(frozen=True)
class CommandOptions:
    """Options of the command beyond those of `transcribe` and of subtitles; never instantiated."""

    recursive: bool = field(default=False, metadata=_files("search subfolders too; outputs keep the folder structure"))
    output_dir: str = field(default=".", metadata=_files("where to write; created if missing", kind="folder"))
    output_name: str | None = field(
        default=None, metadata=_files("name of the outputs without extension (default: the recording's)")
    )
    output_format: str = field(
        default="all",
        metadata=_files(
            f"{', '.join(WRITERS)}; srt,json: several; all: the first five; json_full and score need "
            "token_timestamps=True",
            kind="formats",
        ),
    )
    skip_existing: bool = field(default=False, metadata=_files("skip recordings whose outputs all exist"))
    keep_partial: bool = field(
        default=False,
        metadata=_files("on Ctrl-C, write what was transcribed so far to NAME.partial.srt and so on"),
    )
    model: str = field(
        default="turbo",
        metadata=_model("tiny, large-v3 ...; a repository; a folder or file in any format", kind="name"),
    )
    model_dir: str | None = field(
        default=None,
        metadata=_model("where downloads are stored (default: Hugging Face's cache)", kind="folder"),
    )
    tokenizer: str | None = field(
        default=None, metadata=_model("folder, repository or .tiktoken file, for a model without a tokenizer")
    )
    revision: str | None = field(default=None, metadata=_model("branch, tag or commit of the repository"))
    token: str | None = field(
        default=None, metadata=_model("for private repositories; better set as HF_TOKEN in the environment")
    )
    detect_language: bool = field(
        default=False,
        metadata=_model("only print the language of each recording", group="task", after="language", evaluate=False),
    )
    temperature_increment_on_fallback: float | None = field(
        default=0.2,
        metadata=_model(
            "added to the temperature for each retry, up to 1; None: no retry", group="retries of a window"
        ),
    )
    device: str | None = field(
        default=None,
        metadata=_machine("cpu, gpu, cuda, tpu; gpu:1 is the second (default: the fastest)", kind="device"),
    )
    devices: str | None = field(
        default=None,
        metadata=_machine("how many devices divide the rows of a batch: all, or a number (default: 1)", kind="devices"),
    )
    mesh: str | None = field(
        default=None,
        metadata=_machine(
            "devices by axis: data=4,model=2 divides the rows by four and each layer by two", kind="mesh"
        ),
    )
    dtype: str | None = field(
        default=None,
        metadata=_machine("of the computation (default: float32 on CPUs, bfloat16 on GPUs and TPUs)", kind="dtype"),
    )
    weights: str | None = field(
        default=None,
        metadata=_machine("of the parameters in memory (default: as --dtype); int8 takes the least", kind="weights"),
    )
    kv_cache_dtype: str | None = field(
        default=None,
        metadata=_machine(
            "of the audio's keys and values, which each token reads (default: as --dtype); int8 takes half of bfloat16",
            kind="kv_cache_dtype",
        ),
    )
    fp16: bool | None = field(
        default=None,
        metadata=_machine("True is --dtype float16 (on CPUs still float32), False is --dtype float32", kind="flag"),
    )
    threads: int | None = field(default=0, metadata=_machine("of the CPU; 0: one per core"))
    compilation_cache: bool | str = field(
        default=True, metadata=_machine("store compiled programs: True, False, or a folder", kind="cache")
    )


class Flag(NamedTuple):
    """An option of the command: `--name`, arguments for argparse, default, help, and the option behind it."""

    name: str
    kind: dict[str, Any]
    default: Any
    help: str
    option: Option

    @property
    def dest(self) -> str:
        return self.name.removeprefix("--")


# Group of --help -> what its title adds, in order.
_GROUPS = {
    "input and output": "",
    "model": "",
    "task": "",
    "decoding": "",
    "grammar": "",
    "retries of a window": "",
    "long recordings": "",
    "voice activity": " (these need --vad_filter True)",
    "word timestamps": "",
    "subtitles": " (vtt, srt, lrc and ass; these need --word_timestamps True)",
    "performance": "",
}
VAD = "vad_"  # prefix of the voice detector's parameters


def flag_of(one: Option, prefix: str = "") -> Flag:
    default, help_ = one.command_default, one.help
    if default is None and one.default is not None and "default:" not in help_:
        help_ += f" (default: {one.default:g})"
    return Flag(f"--{prefix}{one.name}", KINDS[kind_of(one, default)], default, help_, one)


def _grouped(flags: list[Flag]) -> dict[str, list[Flag]]:
    """Group title -> its options in order, except those that state which one they follow."""
    groups: dict[str, list[Flag]] = {f"{group}{note}": [] for group, note in _GROUPS.items()}
    for flag in flags:
        groups[f"{flag.option.group}{_GROUPS[flag.option.group]}"].append(flag)
    for members in groups.values():
        for flag in [flag for flag in members if flag.option.after is not None]:
            members.remove(flag)
            names = [other.dest for other in members]
            members.insert(names.index(flag.option.after) + 1 if flag.option.after else 0, flag)
    return groups


VAD_FLAGS = [flag_of(one, VAD) for one in options_of(VadOptions).values()]
SUBTITLE_FLAGS = [flag_of(one) for one in options_of(SubtitleOptions).values()]
TRANSCRIBE_FLAGS = [flag_of(one) for one in options_of(CallOptions, *RECORDING).values() if not one.python_only]
_COMMAND_FLAGS = [flag_of(one) for one in options_of(CommandOptions).values()]
# Group title -> its options, in the order of --help.
OPTIONS = _grouped([*_COMMAND_FLAGS, *TRANSCRIBE_FLAGS, *VAD_FLAGS, *SUBTITLE_FLAGS])

# Keyword arguments of the Python functions -> flags.
_FLAGS = {flag.dest: flag.name for flags in OPTIONS.values() for flag in flags}
_FLAGS |= {flag.option.name: flag.name for flag in VAD_FLAGS}
_FLAGS |= {"stream": "--audio_track", "temperatures": "--temperature", "cache_dir": "--model_dir"}
# A name before "=", or alone if it is not an English word. Not in flags and paths.
_KEYWORD = re.compile(
    rf"(?<![\w./\\,-])(?:({'|'.join(_FLAGS)})=|({'|'.join(n for n in _FLAGS if '_' in n)}|diarize)(?![\w=/\\-]|\.\w))"
)


def as_flags(message: str) -> str:
    """Rewrites keyword arguments in a message as flags: "set max_len=5" -> "set --max_len 5"."""
    return _KEYWORD.sub(lambda match: f"{_FLAGS[match[1]]} " if match[1] else _FLAGS[match[2]], message)


def add_option(group: argparse._ArgumentGroup, flag: Flag, *names: str) -> None:
    group.add_argument(flag.name, *names, **flag.kind, default=flag.default, help=as_flags(flag.help))

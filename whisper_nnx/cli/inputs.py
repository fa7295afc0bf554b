"""From a command's arguments to recordings, and the names of their outputs: files, folders, patterns."""

from __future__ import annotations

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from whisper_nnx.audio.remote import is_remote, name_of
from whisper_nnx.audio.suffixes import SUFFIXES
from whisper_nnx.output.writers import WRITERS, output_files, output_name


@dataclass(frozen=True)
class Input:
    """A recording. stem: of its outputs, below the output folder and without extension."""

    path: str
    stem: str


def find_inputs(arguments: Iterable[str], recursive: bool = False) -> tuple[list[Input], list[Exception]]:
    """What the arguments name, in their order and each once; and what is wrong with others, a line for each.

    A folder stands for its recordings, by extension and with `recursive` also those of the folders in it; a pattern
    (`talks/*.mp3`, `**` for any folders) that names no file stands for all that match. Outputs of what is found below a
    folder keep their place below it.
    """
    found: dict[tuple[str, str], Input] = {}  # by file and name: a link with another name has outputs of its own
    problems: list[Exception] = []
    for argument in arguments:
        try:
            for one in _expand(argument, recursive):
                file = os.path.realpath(one.path) if one.path != "-" else "-"
                found.setdefault((file, os.path.basename(one.path)), one)
        except (OSError, ValueError) as error:
            problems.append(error)
    return list(found.values()), problems


def _expand(argument: str, recursive: bool) -> list[Input]:
    if argument == "-":
        return [Input(argument, output_name(argument))]
    if is_remote(argument):
        return [Input(argument, output_name(name_of(argument)))]
    if os.path.isdir(argument):
        return _in_folder(argument, recursive)
    if glob.has_magic(argument) and not os.path.lexists(argument):
        return _matches(argument, recursive)
    try:
        os.stat(argument)
        if not os.access(argument, os.R_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        from whisper_nnx.audio.loading import OPEN_HINTS  # not for --help

        hint = OPEN_HINTS.get(type(error))
        raise type(error)(f"{argument}: {error.strerror}{f'; {hint}' if hint else ''}") from None
    return [Input(argument, output_name(argument))]


def _in_folder(folder: str, recursive: bool) -> list[Input]:
    found = [Input(str(path), _below(path, folder)) for path in sorted(_recordings(Path(folder), recursive))]
    if not found:
        deeper = "" if recursive else "; --recursive True searches the folders in it, too"
        raise ValueError(f"{folder} holds no recordings (.wav, .mp3, .mp4 and others){deeper}")
    return found


def _recordings(folder: Path, recursive: bool) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):  # hidden, such as macOS's "._talk.mp3", which has no audio
            continue
        if path.is_dir():
            if recursive and not path.is_symlink():
                yield from _recordings(path, recursive)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def _matches(pattern: str, recursive: bool) -> list[Input]:
    fixed = Path(*_leading_folders(pattern))
    found: list[Input] = []
    for match in sorted(glob.glob(pattern, recursive=True)):
        if not os.path.isdir(match):
            found.append(Input(match, _below(Path(match), fixed)))
        elif recursive:
            found += [Input(str(path), _below(path, fixed)) for path in sorted(_recordings(Path(match), recursive))]
    if not found:
        raise FileNotFoundError(f"{pattern}: no file matches; check the pattern")
    return found


def _leading_folders(pattern: str) -> Iterator[str]:
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _below(path: Path, folder: str | Path) -> str:
    return str(path.relative_to(folder).with_name(output_name(path)))


def named(inputs: Sequence[Input], name: str | None) -> list[Input]:
    """The inputs with `name`, if given, for their outputs. Raises ValueError for an unusable name."""
    if name is None:
        return list(inputs)
    if not name.strip() or os.path.basename(name) != name or name in (".", ".."):
        raise ValueError(f"--output_name {name!r} must be a file's name without a folder; --output_dir names that")
    if os.path.splitext(name)[1].removeprefix(".") in WRITERS:
        stem, ending = os.path.splitext(name)
        raise ValueError(f"--output_name {name!r} has an extension; give {stem} with --output_format {ending[1:]}")
    if len(inputs) > 1:
        raise ValueError(f"--output_name {name!r} is for one recording, but there are {len(inputs)}; drop it")
    return [Input(one.path, name) for one in inputs]


def require_distinct(inputs: Sequence[Input], formats: str) -> None:
    """Raises ValueError if two recordings would have the same output files."""
    of_file = defaultdict(list)
    for one in inputs:
        for file in output_files(one.stem, formats):
            of_file[os.path.normcase(file)].append(one.path)
    for file, paths in of_file.items():
        if len(paths) > 1:
            raise ValueError(f"{' and '.join(paths)} would all be written to {file}; rename them, or run once for each")


def without_existing(inputs: Sequence[Input], formats: str, folder: str) -> list[Input]:
    """The inputs that lack some output file."""
    return [one for one in inputs if not all((Path(folder) / f).exists() for f in output_files(one.stem, formats))]

"""Shared by all commands: one-line warnings and errors, failing output, interruptions, exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import textwrap
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from whisper_nnx.runtime.packages import MissingPackageError

NAME = "whisper-nnx"
EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 130, 141  # 128 + signal number, as in shells
_AGAIN_S = 0.01  # after which an interruption that Python ignored is repeated


class Terminated(KeyboardInterrupt):
    """SIGTERM was received; handled like Ctrl-C."""


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Within this context, SIGTERM raises `Terminated`.

    In a destructor or a callback of the garbage collector Python ignores what is raised; then the signal is sent again.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated

    def repeat(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            number = signal.SIGTERM if issubclass(ignored.exc_type, Terminated) else signal.SIGINT
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()
        else:
            report(ignored)

    if threading.current_thread() is not threading.main_thread():  # only there Python allows handlers
        yield
        return
    before, report = signal.signal(signal.SIGTERM, stop), sys.unraisablehook
    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = report
        signal.signal(signal.SIGTERM, before)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Delays the first SIGINT or SIGTERM until the end of this context; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, wait)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if len(received) == 1:
            signal.raise_signal(received[0])


def exit_status(interrupt: KeyboardInterrupt) -> int:
    return 128 + signal.SIGTERM if isinstance(interrupt, Terminated) else EXIT_INTERRUPTED


def say(line: str, name: str = NAME) -> None:
    """Prints a line on stderr with the command's name, above the progress bar if there is one."""
    line = f"{name}: {line}" if name else line
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if tqdm is not None and getattr(tqdm, "_instances", None):
        tqdm.write(line, file=sys.stderr)
    else:
        print(line, file=sys.stderr)


def report_error(
    error: Exception, subject: str, with_traceback: bool, spell: Callable[[str], str] = str, name: str = NAME
) -> None:
    """Reports an error in one line; unexpected types of errors mention --traceback.

    Args:
      error: the error.
      subject: what it concerns, before the message.
      with_traceback: whether to print the traceback too.
      spell: rewrites the message, for example keyword arguments as flags.
      name: of the command.
    """
    if with_traceback:
        traceback.print_exception(error)
    message = spell(one_line(error))
    if not isinstance(error, ValueError | OSError):
        hint = "" if with_traceback else " (unexpected: --traceback shows where it happened)"
        message = f"{type(error).__name__}: {message}{hint}"
    if not message.startswith((f"{subject}:", f"{subject} ")):
        message = f"{subject}: {message}"
    say(message, name)


def one_line(error: BaseException | Warning | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return textwrap.shorten(str(error), 1000, placeholder=" ...") or "no message"


@contextmanager
def plain_warnings(spell: Callable[[str], str] = str, name: str = NAME) -> Iterator[None]:
    """Shows warnings as one line each; spell: rewrites them."""

    def show(message: Warning | str, *_: Any) -> None:
        say(f"warning: {spell(one_line(message))}", name)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


class _Output:
    """A text stream that ignores writes after its file has failed.

    Characters missing from its encoding are written as "?".
    """

    def __init__(self, stream: Any):
        self._stream = stream
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace", line_buffering=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, write: Any) -> Any:
        if self.error is not None:
            return None
        try:
            return write()
        except OSError as error:
            self.error = failed = error
        with suppress(OSError, ValueError, AttributeError):  # buffered text would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if self is sys.stdout and not isinstance(failed, BrokenPipeError):
            say(f"standard output: {one_line(failed)}; text printed from here on is lost, files are not affected")
        return None


@contextmanager
def lasting_output() -> Iterator[_Status]:
    """Within this context, failing standard output or error does not stop the work; `of` gives the exit status.

    A closed pipe (`| head`) gives status 141, other failures of standard output give 1.
    """
    before = sys.stdout, sys.stderr
    status = _Status()
    if sys.stdout is not None:
        status.output = sys.stdout = _Output(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = _Output(sys.stderr)
    try:
        yield status
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit as error:  # from --help and --version
        if sys.stdout is not None:
            sys.stdout.flush()
        raise SystemExit(status.of(int(error.code or 0))) from None
    finally:
        sys.stdout, sys.stderr = before


class _Status:
    output: _Output | None = None

    def of(self, status: int) -> int:
        """Returns the command's status if not 0, else that of its output."""
        if status or self.output is None or self.output.error is None:
            return status
        return EXIT_BROKEN_PIPE if isinstance(self.output.error, BrokenPipeError) else 1


def run_main(module: str, argv: Sequence[str] | None = None, name: str = NAME) -> int:
    """`main` of a module of a command -> exit status. An interruption is one line also while it is imported.

    name: of the command, before that line.
    """
    try:
        with interrupts_wait():  # an extension module may crash where its import is interrupted
            main = importlib.import_module(module).main
        status: int = main(argv)
    except KeyboardInterrupt as interrupt:
        if not any(one.startswith("--worker_name=") for one in (sys.argv[1:] if argv is None else argv)):
            say("interrupted", name)  # of a worker of a job, the command that has started it reports it
        status = exit_status(interrupt)
    return status


def run_command(
    argv: Sequence[str] | None,
    parser: argparse.ArgumentParser,
    parse: Callable[[argparse.ArgumentParser, Sequence[str]], argparse.Namespace],
    work: Callable[[argparse.ArgumentParser, argparse.Namespace], int],
    spell: Callable[[str], str] = str,
    name: str = NAME,
) -> int:
    """What all commands share -> the exit status: that of `work`, 1 after an error, 130 or 143 after an interruption.

    Wrong usage and a missing package end it with status 2, by SystemExit.

    Args:
      argv: the arguments, by default those of the process.
      parser: of the command; its arguments include `traceback`.
      parse: from parser and arguments to their values.
      work: what the command does; returns 0, or 1 where a part of it failed and was reported.
      spell: what is done to warnings and errors, such as putting flags for keyword arguments.
      name: before each line on stderr.
    """
    with lasting_output() as output:
        args = parse(parser, sys.argv[1:] if argv is None else argv)
        try:
            with plain_warnings(spell, name), termination_interrupts():
                status = work(parser, args)
        except KeyboardInterrupt as interrupt:
            say("interrupted", name)
            status = exit_status(interrupt)
        except MissingPackageError as error:
            parser.error(spell(one_line(error)))
        except Exception as error:
            report_error(error, "error", args.traceback, spell, name)
            status = 1
    return output.of(status)

"""The whole pipeline on paper: seconds for hours of audio, from compiled programs and a chip's data sheet.

    python benchmarks/estimate.py tokens CHECKPOINT MANIFEST   # the tokens of real windows, into results/
    python benchmarks/estimate.py                              # the estimates, into results/ and the documents

Nothing here is measured on an accelerator. A program takes the longest of these: its traffic at the memory's rate, its
flops at that of the matrix units, and on TPUs the compiler's cycles (there, arguments stand for the traffic, of which
much stays on the chip). Rates are those of the data sheet, and a part of them (REACHED). The windows' numbers of tokens
are drawn from those of real speech. Rows decode together; where they are refilled, the loop is left when a quarter of
them, at most 16, are done, as `RowDecoder` leaves it, otherwise when all are. The language is given; there are no word
times.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import plan, tables
from benchmarks.programs import BEAMS
from benchmarks.scoring import write_result
from whisper_nnx.decoding.loop import PREFILL_CHUNK
from whisper_nnx.model.config import RELEASED
from whisper_nnx.transcription.row_decoder import LARGEST_GROUP

TOKENS = tables.RESULTS / "base.tokens.json"
ESTIMATE = tables.RESULTS / "accelerators.estimate.json"
MINUTES = 30  # of speech whose tokens are counted
REACHED = (0.85, 0.6)  # of the memory's and the matrix units' rates: assumed
POSITIONS, ELEMENT = 1500, 2  # of a window in the encoder's output; bytes in bfloat16
TEXT_POSITIONS = 448


class Chip(NamedTuple):
    """Bytes/s, dense bfloat16 flop/s and bytes of memory by the data sheet; clock in Hz.

    A TPU's clock is its flop/s over those of a cycle: 4 units of 128 x 128 (v5e) or 256 x 256 (v6e) multiply and add.
    """

    bandwidth: float
    flops: float
    memory: float
    clock: float | None = None


SHEET = {
    "v5e": Chip(819e9, 197e12, 16e9, 197e12 / (4 * 2 * 128**2)),
    "v6e": Chip(1640e9, 918e12, 32e9, 918e12 / (4 * 2 * 256**2)),
    "h200": Chip(4.8e12, 989e12, 141e9),
}


@dataclass(frozen=True)
class Host:
    """Seconds in which a process decodes an hour of MP3; processes; host time per program and per window, in ms.

    The first is that of two processes side by side in results/files.reading.json. The others are assumed: the
    processes that 16 cores have by default.
    """

    decoding_s: float = 8.9
    processes: int = 12
    program_ms: float = 0.2
    window_ms: float = 1.0


@dataclass(frozen=True)
class Case:
    """What is estimated: hours in one batch job. cross_bytes: of an element of the audio keys and values."""

    chip: str
    size: str
    hours: int = 1
    beam: bool = False
    cross_bytes: int = 2
    refilled: bool = True
    files: int = 16  # per hour; a file is decoded by one core
    faster: float = 1.0  # speech: that many times the tokens


def steps(tokens: Sequence[int], rows: int, leave_at: int | None) -> tuple[int, int, int]:
    """Steps until windows with these numbers of tokens are decoded in that many rows.

    leave_at: the loop is left when so many rows are done while windows wait; None: when all are.

    Returns:
      The steps; how often rows are filled; how often the cache is moved up before that.
    """
    waiting, going = list(reversed(tokens)), list[tuple[int, int]]()  # tokens of a row, and where it began
    end = total = fills = moves = 0
    while waiting or going:
        if len(going) < rows and waiting and (leave_at or not going):
            fills += 1
            longest = max((end - began for _, began in going), default=0)
            if min(end, TEXT_POSITIONS) > 2 * max(longest, PREFILL_CHUNK):
                moves, going, end = moves + 1, [(n, began - end + longest) for n, began in going], longest
            while len(going) < rows and waiting:
                going.append((waiting.pop(), end))
        lasts = sorted(began + n - end for n, began in going)
        taken = lasts[min(leave_at, len(lasts)) - 1] if leave_at and waiting else lasts[-1]
        total, end = total + taken, end + taken
        going = [(n, began) for n, began in going if began + n > end]
    return total, fills, moves


def program_s(row: dict[str, Any], chip: Chip, reached: tuple[float, float], less_mb: float = 0.0) -> tuple[float, str]:
    """Seconds of a program, and what bounds it. less_mb: traffic that is saved."""
    is_tpu = chip.clock is not None
    traffic = row["arguments_mb"] if is_tpu else row["mb"]
    bounds = {"memory": (traffic - less_mb) * 1e6 / (chip.bandwidth * reached[0])}
    bounds["arithmetic"] = row["gflop"] * 1e9 / (chip.flops * reached[1])
    if chip.clock is not None:
        kernel_s = row["kernel_gflop"] * 1e9 / (chip.flops * reached[1])  # for which the compiler has no cycles
        bounds["cycles"] = row["mcycles"] * 1e6 / chip.clock + kernel_s
    bound = max(bounds, key=lambda name: bounds[name])
    return bounds[bound], bound


def estimate(
    case: Case, rows: dict[tuple[str, str, str], dict[str, Any]], tokens: Sequence[int], window_s: float, host: Host
) -> dict[str, Any]:
    """Seconds of a case and of its parts, at the data sheet's rates and at what is assumed to be reached of them."""
    chip, config = SHEET[case.chip], RELEASED[case.size]
    kind = "beam" if case.beam else "step"
    encode, prompt, step = (rows[case.chip, case.size, name] for name in ("encode", "prompt", kind))
    move, less_mb = rows.get((case.chip, case.size, "move up")), 0.0
    if case.cross_bytes != ELEMENT:
        eight = rows.get((case.chip, case.size, f"{kind} int8"))
        cross_mb = 2 * config.decoder_layers * POSITIONS * config.d_model * ELEMENT / 1e6  # of a window
        less_mb = 0.0 if eight else cross_mb * step["batch"] * (1 - case.cross_bytes / ELEMENT)
        step = eight or step
    batch = step["batch"]
    larger = batch * (BEAMS if case.beam else 1) / move["batch"] if move else 0.0
    windows = round(3600 * case.hours / window_s)
    drawn = [round(case.faster * n) for n in random.Random(0).choices(tokens, k=windows)]
    n_steps, fills, moves = steps(drawn, batch, max(1, min(LARGEST_GROUP, batch // 4)) if case.refilled else None)
    found: dict[str, Any] = asdict(case) | {"batch": batch, "windows": windows, "steps": n_steps}
    for name, reached in (("sheet", (1.0, 1.0)), ("reached", REACHED)):
        step_s, bound = program_s(step, chip, reached, less_mb)
        parts = {
            "encoder": windows / encode["batch"] * program_s(encode, chip, reached)[0],
            "prompt": windows / prompt["batch"] * program_s(prompt, chip, reached)[0],
            "steps": n_steps * step_s,
            "moves": moves * larger * (program_s(move, chip, reached)[0] if move else 0.0),
            "dispatch": (windows / encode["batch"] + 2 * fills) * host.program_ms / 1e3,
        }
        device_s = sum(parts.values())
        processes = min(host.processes, case.files * case.hours)
        host_s = {"decoding": case.hours * host.decoding_s / processes, "driver": windows * host.window_ms / 1e3}
        slowest = max((device_s, "device"), *((s, part) for part, s in host_s.items()))
        found[name] = {
            "s": round(slowest[0], 3),
            "times": round(3600 * case.hours / slowest[0]),
            "parts": {part: round(s, 3) for part, s in (parts | host_s).items()},
            "bound": slowest[1] if slowest[1] != "device" else max(parts, key=lambda part: parts[part]),
            "step_ms": round(step_s * 1e3, 3),
            "step_bound": bound,
            "encoder_bound": program_s(encode, chip, reached)[1],
        }
    return found


def cases(rows: dict[tuple[str, str, str], dict[str, Any]]) -> Iterator[Case]:
    """What is estimated, of what was compiled."""
    for chip in ("h200", "v6e", "v5e"):
        for size in ("large-v3", "large-v3-turbo"):
            if (chip, size, "beam") in rows:
                yield Case(chip, size)
                yield Case(chip, size, cross_bytes=1)
                yield Case(chip, size, 100, refilled=False)
                yield Case(chip, size, 100)
                yield Case(chip, size, 100, cross_bytes=1)
                yield Case(chip, size, beam=True)
    yield Case("h200", "large-v3", faster=1.5)
    yield Case("h200", "large-v3", files=1)


def count_tokens(checkpoint: Path, manifest: Path) -> None:
    """Writes the tokens, end of text included, that a checkpoint decodes in windows of real speech."""
    import numpy as np

    import whisper_nnx
    from benchmarks import speech
    from benchmarks.systems import GREEDY, SAMPLE_RATE

    model = whisper_nnx.load_model(str(checkpoint))
    audio = speech.long(speech.read(manifest, {"en"}), MINUTES).audio
    clips = speech.cut(audio, search_s=2.0)
    frames = [
        whisper_nnx.log_mel_spectrogram(whisper_nnx.pad_or_trim(clip), model.config.num_mel_bins) for clip in clips
    ]
    tokens = []
    for start in range(0, len(frames), 8):
        mel = np.stack([np.asarray(mel) for mel in frames[start : start + 8]])
        results = whisper_nnx.decode(model, mel, language="en", temperature=GREEDY["temperature"])
        tokens += [len(result.tokens) + 1 for result in results]
    versions = {"whisper_nnx": whisper_nnx.__version__}
    window_s = round(float(np.mean([len(clip) for clip in clips])) / SAMPLE_RATE, 2)
    write_result(TOKENS, checkpoint.name, versions, window_s=window_s, tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    counting = commands.add_parser("tokens", help="count the tokens of real windows")
    counting.add_argument("checkpoint", type=Path)
    counting.add_argument("manifest", type=Path)
    for name, value in asdict(Host()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args()
    if args.command == "tokens":
        count_tokens(args.checkpoint, args.manifest)
        return
    table = plan.read().items()
    rows = {(r.chip, r.size, f"{r.program} {r.cross or ''}".strip()): found for r, found in table}
    real = json.loads(TOKENS.read_text())
    host = Host(**{name: getattr(args, name) for name in asdict(Host())})
    found = [estimate(case, rows, real["tokens"], real["window_s"], host) for case in cases(rows)]
    versions = {"windows": f"{len(real['tokens'])} of {real['window_s']} s, {sum(real['tokens'])} tokens"}
    write_result(ESTIMATE, "estimate", versions, host=asdict(host), reached=REACHED, estimates=found)
    tables.main([])


if __name__ == "__main__":
    main()

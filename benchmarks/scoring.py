"""Scores transcripts, counting loops separately from errors, and writes results to files."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from whisper_nnx.evaluation.normalizers import split

LOOP_TIMES = 4  # repetitions in a row that make a loop
LOOP_WORDS = 16  # longest phrase of a loop


def without_loops(words: Sequence[str]) -> tuple[list[str], int]:
    """Reduces phrases repeated four or more times in a row to one; returns the words and the number removed."""
    kept: list[str] = []
    i = 0
    while i < len(words):
        for size in range(1, LOOP_WORDS + 1):
            end = i + size
            while end < len(words) and words[end] == words[end - size]:
                end += 1
            if end - i >= size * LOOP_TIMES:
                kept += words[i : i + size]
                i = end
                break
        else:
            kept.append(words[i])
            i += 1
    return kept, len(words) - len(kept)


def score(texts: Sequence[str], spoken: Sequence[str], languages: Sequence[str]) -> dict[str, int]:
    """Counts words written and spoken, errors without loops, words in loops, and recordings with loops.

    In languages written without spaces, characters count as words.
    """
    import jiwer

    truths = [split(text, language) for text, language in zip(spoken, languages, strict=True)]
    written = [split(text, language) for text, language in zip(texts, languages, strict=True)]
    pairs = [without_loops(words) for words in written]
    found = jiwer.process_words([" ".join(words) for words in truths], [" ".join(words) for words, _ in pairs])
    return {
        "words": sum(map(len, written)),
        "spoken": sum(map(len, truths)),
        "substitutions": found.substitutions,
        "deletions": found.deletions,
        "insertions": found.insertions,
        "loop_words": sum(removed for _, removed in pairs),
        "loops": sum(removed > 0 for _, removed in pairs),
    }


def write_result(path: Path, checkpoint: str, versions: dict[str, str], **found: Any) -> None:
    """Writes a JSON file with the results, date, machine and versions."""
    about = {
        "checkpoint": checkpoint,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | found, indent=1, ensure_ascii=False) + "\n")


def machine() -> str:
    """Describes the processor, by model if Linux names it, and its number of cores."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split("\t: ", 1) for line in info.split("\n\n")[0].splitlines() if "\t: " in line)
    fields |= {key.strip(): value for key, value in fields.items()}
    name = fields.get("model name", platform.processor() or platform.machine())
    features = {"AMX": "amx_bf16", "AVX-512 with bfloat16": "avx512_bf16", "AVX-512": "avx512f", "AVX2": "avx2"}
    flags = fields.get("flags", "").split()
    best = next((f" ({label})" for label, flag in features.items() if flag in flags), "")
    return f"{name}{best}, {os.cpu_count()} cores"

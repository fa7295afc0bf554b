"""Makes training manifests of the transcripts of a job, without those that may be wrong.

    whisper-nnx batch talks/ --output job --model large-v3
    python examples/pseudo_labels/make_manifest.py job data/pseudo [--validation 0.02]

Writes data/pseudo/train.jsonl and validation.jsonl. Left out are transcripts without text, and the suspicious ones of
`whisper-nnx batch report job`: loops, improbable text, unsure languages, unlikely rates of speech. Recordings of more
than 30 s are cut between segments, into data/pseudo/clips; so are those that are inside another file, and all those of
a job with options that decide how a recording is read, such as `--audio_track`.
"""

import argparse
import hashlib
import json
import wave
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from whisper_nnx import load_audio
from whisper_nnx.jobs.inputs import Recording
from whisper_nnx.jobs.job import Job
from whisper_nnx.jobs.status import suspicions
from whisper_nnx.jobs.worker import reading_options
from whisper_nnx.output.writers import ESCAPED

RATE, WINDOW_S = 16_000, 30.0


def manifest_rows(
    row: dict[str, Any], recording: Recording, folder: Path, reading: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of a manifest from one of a job: none, one, or one for each piece of a recording that is cut.

    reading: the job's arguments of `load_audio`.
    """
    duration = row["duration"]
    clipped = [{key: s[key] for key in ("start", "text")} | {"end": min(s["end"], duration)} for s in row["segments"]]
    segments = [s for s in clipped if s["text"].strip() and 0 < s["end"] - s["start"] <= WINDOW_S]
    if not segments or suspicions(row):
        return
    common = {"id": row["id"], "language": row["language"]}
    if duration <= WINDOW_S and recording.part is None and not reading:
        yield common | {"audio": row["audio"], "duration": duration} | texts(segments)
        return
    found, before = recording.read(**reading), ""
    samples = found if isinstance(found, np.ndarray) else load_audio(found, **reading)  # a part was read with these
    for number, piece in enumerate(pieces(segments)):
        start, end = piece[0]["start"], piece[-1]["end"]
        name = f"{hashlib.sha256(row['id'].encode()).hexdigest()[:16]}-{number:04d}.wav"
        sound = np.clip(samples[round(start * RATE) : round(end * RATE)], -1, 1) * 32767
        with wave.open(str(folder / name), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(sound.astype("<i2").tobytes())
        shifted = [s | {"start": s["start"] - start, "end": s["end"] - start} for s in piece]
        about = {"audio": f"{folder.name}/{name}", "duration": end - start, "previous_text": before}
        yield common | about | texts(shifted)
        before = texts(piece)["text"]


def pieces(segments: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Segments that follow each other, as many as a window takes."""
    piece: list[dict[str, Any]] = []
    for segment in segments:
        if piece and segment["end"] - piece[0]["start"] > WINDOW_S:
            yield piece
            piece = []
        piece.append(segment)
    yield piece


def rows_of(job: Job) -> Iterator[tuple[dict[str, Any], Recording]]:
    """The transcripts of the shards that are done, with their recordings."""
    for shard in filter(job.is_done, range(job.shards)):
        recordings = {one.id: one for one in job.shard(shard)}
        with job.path("results", shard).open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                yield row, recordings[row["id"]]


def texts(segments: list[dict[str, Any]]) -> dict[str, Any]:
    return {"text": "".join(s["text"] for s in segments).strip(), "segments": segments}


def split_of(id_: str, validation: float) -> str:
    """A recording is in the same manifest each time."""
    return "validation" if zlib.crc32(id_.encode(errors=ESCAPED)) < validation * 2**32 else "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", help="folder of the job")
    parser.add_argument("folder", type=Path, help="where the manifests are written")
    parser.add_argument("--validation", type=float, default=0.02, help="share of recordings to validate with")
    args = parser.parse_args()
    clips = args.folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    counts = Counter[str]()
    with (
        (args.folder / "train.jsonl").open("w", encoding="utf-8", errors=ESCAPED) as train,
        (args.folder / "validation.jsonl").open("w", encoding="utf-8", errors=ESCAPED) as validation,
    ):
        files = {"train": train, "validation": validation}
        reading = reading_options(job := Job.open(args.job))
        for row, recording in rows_of(job):
            made = list(manifest_rows(row, recording, clips, reading))
            split = split_of(row["id"], args.validation) if made else "left out"
            counts[split] += 1
            for one in made:
                files[split].write(json.dumps(one, ensure_ascii=False) + "\n")
    print(", ".join(f"{count} {split}" for split, count in sorted(counts.items())))


if __name__ == "__main__":
    main()

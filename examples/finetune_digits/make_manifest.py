"""Makes manifests of spoken English digits to fine-tune on: several of one speaker, their names written in Spanish.

    python examples/finetune_digits/make_manifest.py free_spoken_digits_train.tar data/digits [--names en]

The archive holds FLAC files {digit}_{speaker}_{index}.flac, as of the Free Spoken Digit Dataset. In data/digits come
train.jsonl (index below 45), validation.jsonl (the others: other recordings of the same speakers) and their sound. With
`--names en` the digits keep their own names, to see what a checkpoint knows of them already.
"""

import argparse
import io
import json
import tarfile
import wave
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from whisper_nnx import load_audio

FIRST_VALIDATION = 45
RATE = 16_000
NAMES = {
    "es": ["cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve"],
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
ROWS = {"train": 1800, "validation": 120}
DIGITS = (3, 7)  # of a row: from, to
GAP_S = (0.05, 0.4)  # before each digit, and after the last

Recordings = dict[str, list[tuple[int, np.ndarray]]]


def read(archive: Path) -> dict[str, Recordings]:
    """split -> speaker -> (digit, samples [N])."""
    found: dict[str, Recordings] = {split: defaultdict(list) for split in ROWS}
    with tarfile.open(archive) as tar:
        for member in sorted(tar, key=lambda member: member.name):
            if member.isfile() and member.name.endswith(".flac"):
                digit, speaker, index = Path(member.name).stem.split("_")
                split = "train" if int(index) < FIRST_VALIDATION else "validation"
                sound = tar.extractfile(member)
                assert sound is not None
                found[split][speaker].append((int(digit), load_audio(io.BytesIO(sound.read()))))
    return found


def make_row(
    folder: Path, name: str, recordings: Recordings, random: np.random.Generator, names: str = "es"
) -> dict[str, object]:
    """Writes the audio of a row and returns its manifest entry."""
    speaker = str(random.choice(sorted(recordings)))
    parts: list[np.ndarray] = []
    words: list[dict[str, Any]] = []
    at = 0
    for number in random.integers(len(recordings[speaker]), size=random.integers(DIGITS[0], DIGITS[1] + 1)):
        digit, samples = recordings[speaker][number]
        gap = int(random.uniform(*GAP_S) * RATE)
        parts += [np.zeros(gap, np.float32), samples]
        words.append({"word": NAMES[names][digit], "start": (at + gap) / RATE, "end": (at + gap + len(samples)) / RATE})
        at += gap + len(samples)
    parts.append(np.zeros(int(random.uniform(*GAP_S) * RATE), np.float32))
    with wave.open(str(folder / name), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.concatenate(parts).clip(-1, 1) * 32767).astype("<i2").tobytes())
    words[0]["word"], words[-1]["word"] = words[0]["word"].capitalize(), f"{words[-1]['word']}."
    text = " ".join(word["word"] for word in words)
    return {"audio": name, "text": text, "language": "en", "words": words, "source": speaker}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", choices=NAMES, default="es", help="the language in which the digits are written")
    given = parser.parse_args()
    found, random = read(given.archive), np.random.default_rng(0)
    (given.folder / "sound").mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        sounds = [f"sound/{split}_{i}.wav" for i in range(count)]
        rows = [make_row(given.folder, sound, found[split], random, given.names) for sound in sounds]
        (given.folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{given.folder / split}.jsonl: {count} rows")


if __name__ == "__main__":
    main()

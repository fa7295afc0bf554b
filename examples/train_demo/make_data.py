"""Makes the demo model's data: sentences spoken by espeak-ng and flite, and rows of real digits.

    python examples/train_demo/make_data.py --digits free_spoken_digits_train.tar --output data/demo

Writes FLAC files, manifests (train_*.jsonl, validation.jsonl: short rows; test.jsonl: recordings of 30 s to 5 min) and
sentences.txt, from which the vocabulary is made.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr
from sentences import LANGUAGES, sentence, spoken_digits
from speech import SAMPLE_RATE, Speech, espeak, flite
from tqdm import tqdm

ACCENTS = {"en": ("en-us", "en", "en-gb-x-rp"), "de": ("de",), "es": ("es", "es-419"), "fr": ("fr", "fr-be")}
VARIANTS = ("", "+m1", "+m3", "+m4", "+m7", "+f1", "+f2", "+f3", "+f4", "+Andrea")
FLITE_VOICES = ("kal", "kal16", "awb", "rms", "slt")
ROWS = {"en": 16_000, "de": 12_000, "es": 10_000, "fr": 12_000, "digits": 10_000}  # of the training data
VALIDATION_DIGITS = range(5, 8)  # recording numbers; the training data are 8 to 49, and 0 to 4 are held out
LONG_S = (30, 60, 120, 300)  # minimum lengths of test recordings, for each source


def speak(language: str, rng: random.Random) -> tuple[str, str | None, str, Speech]:
    """Returns a sentence, its English translation or None, its source, and its synthesized speech."""
    what = sentence(language, rng)
    if language == "en" and rng.random() < 0.4:
        voice = rng.choice(FLITE_VOICES)
        speech = flite(what.text, voice, stretch=rng.uniform(0.85, 1.3), pitch=rng.uniform(85, 220))
        return what.text, what.english, "flite", speech
    voice = rng.choice(ACCENTS[language]) + rng.choice(VARIANTS)
    return what.text, what.english, "espeak-ng", espeak(what.text, voice, rng.randint(130, 210), rng.randint(30, 70))


def read_digits(archive: Path) -> dict[tuple[int, str, int], np.ndarray]:
    """Reads waveforms at 16 kHz by (digit, speaker, number)."""
    clips = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".flac"):
                digit, speaker, number = Path(member.name).stem.split("_")
                with av.open(io.BytesIO(tar.extractfile(member).read())) as container:
                    frames = [frame.to_ndarray().ravel() for frame in container.decode(audio=0)]
                samples = np.concatenate(frames).astype(np.float32) / 32768
                clips[int(digit), speaker, int(number)] = soxr.resample(samples, 8000, SAMPLE_RATE).astype(np.float32)
    return clips


def say_digits(clips: dict[tuple[int, str, int], np.ndarray], rng: random.Random) -> tuple[str, None, str, Speech]:
    """One to eight digits of one speaker, with pauses of up to half a second."""
    speaker = rng.choice(sorted({speaker for _, speaker, _ in clips}))
    chosen = rng.choices(sorted(key for key in clips if key[1] == speaker), k=rng.randint(1, 8))
    text = spoken_digits([digit for digit, _, _ in chosen])
    pieces, words, at = [], [], 0
    for key, word in zip(chosen, text.split(), strict=True):
        clip = clips[key] * rng.uniform(0.4, 0.6) / max(1e-6, np.abs(clips[key]).max())
        gap = int(rng.uniform(0.02, 0.4) ** rng.uniform(1, 2) * SAMPLE_RATE)
        words.append((word, round(at / SAMPLE_RATE, 3), round((at + len(clip)) / SAMPLE_RATE, 3)))
        pieces += [clip, np.zeros(gap, np.float32)]
        at += len(clip) + gap
    return text, None, "digits", Speech(np.concatenate(pieces[:-1]), words)


def write_flac(path: Path, waveform: np.ndarray) -> None:
    with av.open(str(path), "w", format="flac") as container:
        stream = container.add_stream("flac", rate=SAMPLE_RATE, layout="mono")
        samples = (np.clip(waveform, -1, 1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        container.mux([*stream.encode(frame), *stream.encode(None)])


def row(path: Path, text: str, language: str, source: str, speech: Speech, **more: Any) -> dict[str, Any]:
    words = [{"word": word, "start": start, "end": end} for word, start, end in speech.words]
    duration = round(len(speech.waveform) / SAMPLE_RATE, 3)
    what = {"audio": f"audio/{path.name}", "text": text, "language": language, "source": source}
    return {**what, "duration": duration, "words": words, **more}


def short_rows(folder: Path, name: str, language: str, clips: dict | None, seed: int, n: int) -> list[dict[str, Any]]:
    """Makes n rows and their translations."""
    rng, rows = random.Random(seed), []
    for i in range(n):
        text, english, source, speech = say_digits(clips, rng) if clips else speak(language, rng)
        path = folder / "audio" / f"{name}_{seed}_{i:04d}.flac"
        write_flac(path, speech.waveform)
        rows.append(row(path, text, language, source, speech))
        if english:
            rows.append({**row(path, english, language, source, speech), "task": "translate"})
            del rows[-1]["words"]  # they are in another language
    return rows


def long_row(folder: Path, name: str, language: str, clips: dict | None, rng: random.Random, at_least_s: float) -> dict:
    """Makes one recording of many sentences with pauses between them."""
    pieces, words, segments, at = [np.zeros(SAMPLE_RATE // 2, np.float32)], [], [], 0.5
    while at < at_least_s:
        text, _, _, speech = say_digits(clips, rng) if clips else speak(language, rng)
        length, pause = len(speech.waveform) / SAMPLE_RATE, rng.choice((0.3, 0.6, 1.0, 2.0))
        segments.append({"start": round(at, 3), "end": round(at + length, 3), "text": text})
        words += [(word, round(at + a, 3), round(at + b, 3)) for word, a, b in speech.words]
        pieces += [speech.waveform, np.zeros(int(pause * SAMPLE_RATE), np.float32)]
        at += (len(pieces[-2]) + len(pieces[-1])) / SAMPLE_RATE
    waveform = np.concatenate(pieces)
    waveform += np.random.default_rng(rng.randrange(1 << 30)).normal(0, 1e-3, len(waveform)).astype(np.float32)
    path = folder / "audio" / f"{name}.flac"
    write_flac(path, waveform)
    text = " ".join(segment["text"] for segment in segments)
    return row(path, text, language, "digits" if clips else "synthesized", Speech(waveform, words), segments=segments)


def jobs(rows: dict[str, int], part: int = 500) -> Iterator[tuple[str, int, int]]:
    """(source, seed, number of rows)."""
    for i, (source, total) in enumerate(rows.items()):
        for j in range(0, total, part):
            yield source, 1000 * i + j // part, min(part, total - j)


def write_manifest(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {sum(each['duration'] for each in rows) / 3600:.1f} h")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, required=True, help="tar of the Free Spoken Digit Dataset")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of rows; 0.01 for a trial")
    arguments = parser.parse_args()
    folder = arguments.output
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    clips = read_digits(arguments.digits)
    held_out = {key: clip for key, clip in clips.items() if key[2] in VALIDATION_DIGITS}
    clips = {key: clip for key, clip in clips.items() if key not in held_out}

    train = {source: max(1, int(n * arguments.scale)) for source, n in ROWS.items()}
    rows: dict[str, list[dict[str, Any]]] = {source: [] for source in ROWS}
    with ProcessPoolExecutor() as pool:
        tasks = [
            (source, pool.submit(short_rows, folder, source, *_language(source, clips), seed, n))
            for source, seed, n in jobs(train)
        ]
        for source, task in tqdm(tasks, desc="speaking", unit="part"):
            rows[source] += task.result()
    for source, each in rows.items():
        write_manifest(folder / f"train_{source}.jsonl", each)
    validation = []
    for i, source in enumerate(ROWS):
        validation += short_rows(folder, f"validation_{source}", *_language(source, held_out), 10**6 + i, 100)
    write_manifest(folder / "validation.jsonl", validation)
    rng = random.Random(2 * 10**6)
    tests = [
        long_row(folder, f"test_{source}_{s}s", *_language(source, held_out), rng, s) for source in ROWS for s in LONG_S
    ]
    write_manifest(folder / "test.jsonl", tests)
    texts = {each["text"] for each_source in rows.values() for each in each_source}
    (folder / "sentences.txt").write_text("\n".join(sorted(texts)), encoding="utf-8")


def _language(source: str, clips: dict) -> tuple[str, dict | None]:
    assert source in (*LANGUAGES, "digits")
    return ("en", clips) if source == "digits" else (source, None)


if __name__ == "__main__":
    main()

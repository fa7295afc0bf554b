"""Benchmark audio: real recordings with texts, joined and cut, and audio without speech."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.systems import SAMPLE_RATE

WINDOW_S = 30


@dataclass(frozen=True)
class Recording:
    audio: np.ndarray  # float32, 16 kHz
    text: str
    language: str
    name: str

    @property
    def duration_s(self) -> float:
        return len(self.audio) / SAMPLE_RATE


def read(manifest: Path, languages: set[str] | None = None) -> list[Recording]:
    """Reads the rows of a manifest (JSON lines with audio, text and language) in these languages."""
    from whisper_nnx.audio.loading import load_audio

    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows = [row for row in rows if languages is None or row["language"] in languages]
    if not rows:
        raise SystemExit(f"{manifest} has no recordings in {', '.join(sorted(languages or ()))}; give another manifest")
    return [
        Recording(load_audio(manifest.parent / row["audio"]), row["text"], row["language"], Path(row["audio"]).stem)
        for row in rows
    ]


def one_window(recordings: list[Recording]) -> Recording:
    """Joins as many recordings, shortest first, as fit into a window of 30 s."""
    chosen, left_s = [], float(WINDOW_S)
    for recording in sorted(recordings, key=lambda recording: recording.duration_s):
        if recording.duration_s <= left_s:
            chosen.append(recording)
            left_s -= recording.duration_s
    return joined(chosen, "window")


def long(recordings: list[Recording], minutes: float) -> Recording:
    """Makes a recording of about this length; each round has another order, so that repeated recordings are at other
    places in their windows."""
    order, chosen, left_s = random.Random(0), [], minutes * 60
    while left_s > 0:
        for recording in order.sample(recordings, len(recordings)):
            if left_s > 0:
                chosen.append(recording)
                left_s -= recording.duration_s
    return joined(chosen, "long")


def joined(recordings: list[Recording], name: str) -> Recording:
    text = " ".join(recording.text for recording in recordings)
    return Recording(np.concatenate([r.audio for r in recordings]), text, recordings[0].language, name)


def cut(audio: np.ndarray, longest_s: float = WINDOW_S, search_s: float = 10.0) -> list[np.ndarray]:
    """Cuts clips of at most `longest_s`, at the quietest 0.2 s of their last `search_s`."""
    clips, size, hop = [], int(longest_s * SAMPLE_RATE), SAMPLE_RATE // 10
    while len(audio) > size:
        start = size - int(search_s * SAMPLE_RATE)
        power = (audio[start:size].reshape(-1, hop) ** 2).mean(axis=1)
        end = start + hop * (1 + int(np.argmin(power[:-1] + power[1:])))
        clips.append(audio[:end])
        audio = audio[end:]
    return [*clips, audio]


def noisy(recording: Recording, ratio_db: float) -> Recording:
    """Adds pink noise at a signal-to-noise ratio."""
    noise = pink(len(recording.audio), np.random.default_rng(len(recording.audio)))
    scale = np.sqrt((recording.audio**2).mean() / (noise**2).mean()) * 10 ** (-ratio_db / 20)
    return Recording(
        recording.audio + noise * np.float32(scale),
        recording.text,
        recording.language,
        f"{recording.name}, {ratio_db:g} dB",
    )


def pink(samples: int, source: np.random.Generator, power: float = 1) -> np.ndarray:
    """Returns noise of standard deviation 1 whose power falls with frequency, or (2: brown) with its square."""
    spectrum = np.fft.rfft(source.standard_normal(samples))
    spectrum /= np.maximum(1, np.arange(len(spectrum))) ** (power / 2)
    noise = np.fft.irfft(spectrum, samples)
    return (noise / noise.std()).astype(np.float32)


def music(t: np.ndarray, source: np.random.Generator) -> np.ndarray:
    """Returns chords of three tones, one per second, and a melody of four tones per second, with decaying harmonics."""
    signal = np.zeros_like(t)
    for notes_per_s, octave, voices, level in ((1, 0, 3, 0.06), (4, 12, 1, 0.08)):
        beats = int(t[-1] * notes_per_s) + 1
        steps = source.choice([0, 2, 4, 5, 7, 9, 11], (voices, beats))
        beat = (t * notes_per_s).astype(int)
        decay = np.exp(-3 * (t * notes_per_s - beat))
        for voice in steps:
            pitch = 220 * 2 ** ((voice[beat] + octave) / 12)
            phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
            signal += level * decay * sum(np.sin(k * phase) / k**2 for k in range(1, 6))
    return signal

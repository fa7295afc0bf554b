"""Text to speech with the times of the words, by the libraries of espeak-ng and flite (Debian: espeak-ng, flite).

Their commands do not say when a word is spoken, the libraries do.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import POINTER, c_char_p, c_float, c_int, c_short, c_uint, c_void_p
from functools import cache
from typing import NamedTuple

import numpy as np
import soxr

SAMPLE_RATE = 16000


class Speech(NamedTuple):
    """waveform: [N], 16 kHz, float32, without silence around it. words: (word, start, end), s."""

    waveform: np.ndarray
    words: list[tuple[str, float, float]]


# espeak-ng: speak_lib.h

_SYNCHRONOUS = 2
_RATE, _PITCH, _RANGE = 1, 3, 4
_CHARACTERS, _UTF8 = 1, 1
_WORD, _END = 1, 5


class _Id(ctypes.Union):
    _fields_ = (("number", c_int), ("name", c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        *(("type", c_int), ("unique_identifier", c_uint), ("text_position", c_int), ("length", c_int)),
        *(("audio_position", c_int), ("sample", c_int), ("user_data", c_void_p), ("id", _Id)),
    )


_Callback = ctypes.CFUNCTYPE(c_int, POINTER(c_short), c_int, POINTER(_Event))


class _Espeak:
    """The library, which has one voice at a time."""

    def __init__(self):
        self.library = ctypes.CDLL("libespeak-ng.so.1")
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, None, 0)
        self.pieces: list[np.ndarray] = []
        self.events: list[tuple[int, int, float]] = []
        self._callback = _Callback(self._receive)  # kept: the library holds only a pointer
        self.library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, n_samples: int, events) -> int:
        if samples and n_samples:
            self.pieces.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        for event in events:  # ends by a return or the break: the array is as long as its last event says
            if event.type == 0:
                break
            if event.type in (_WORD, _END):
                self.events.append((event.type, event.text_position, event.audio_position / 1000))
        return 0

    def speak(self, text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> None:
        self.pieces, self.events = [], []
        if self.library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}; see `espeak-ng --voices` and `--voices=variant`")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self.library.espeak_SetParameter(parameter, value, 0)
        data = text.encode()
        self.library.espeak_Synth(data, len(data) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)


_espeak = cache(_Espeak)


def espeak(text: str, voice: str, rate: int = 175, pitch: int = 50, pitch_range: int = 50) -> Speech:
    """voice: such as "de+f2". rate: words in a minute. pitch, pitch_range: 0 to 99."""
    engine = _espeak()
    engine.speak(text, voice, rate, pitch, pitch_range)
    samples = np.concatenate(engine.pieces).astype(np.float32) / 32768
    starts = {position - 1: at for kind, position, at in engine.events if kind == _WORD}
    ends = sorted(at for kind, _, at in engine.events if kind == _END)
    return _finish(samples, engine.rate, _words(text, starts, ends, len(samples) / engine.rate))


def _words(text: str, starts: dict[int, float], clause_ends: list[float], end: float) -> list[tuple[str, float, float]]:
    """Returns words with times; words that the engine spoke as one unit share its time by their letters."""
    found = [(match.start(), match.end()) for match in re.finditer(r"\S+", text)]
    groups: list[list[tuple[int, int]]] = []
    times: list[float] = []
    for first, last in found:
        inside = [at for position, at in starts.items() if first <= position < last]
        if inside or not groups:
            groups.append([])
            times.append(min(inside, default=0.0))
        groups[-1].append((first, last))
    words = []
    for group, start, follows in zip(groups, times, [*times[1:], end], strict=True):
        stop = min([follows, *(at for at in clause_ends if at > start)])
        letters = np.cumsum([0, *(last - first for first, last in group)]) / sum(last - first for first, last in group)
        bounds = start + letters * (stop - start)
        words += [(text[a:b], bounds[i], bounds[i + 1]) for i, (a, b) in enumerate(group)]
    return words


# flite: flite.h, cst_item.h


@cache
def _flite() -> ctypes.CDLL:
    library = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
    for name in ("libflite_cmulex.so.1", "libflite_usenglish.so.1"):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    library.flite_init()
    for name, result, arguments in (
        ("flite_synth_text", c_void_p, [c_char_p, c_void_p]),
        ("utt_relation", c_void_p, [c_void_p, c_char_p]),
        ("utt_wave", c_void_p, [c_void_p]),
        ("relation_head", c_void_p, [c_void_p]),
        ("item_next", c_void_p, [c_void_p]),
        ("item_feat_string", c_char_p, [c_void_p, c_char_p]),
        ("ffeature_float", c_float, [c_void_p, c_char_p]),
        ("ffeature_string", c_char_p, [c_void_p, c_char_p]),
        ("delete_utterance", None, [c_void_p]),
        ("feat_set", None, [c_void_p, c_char_p, c_void_p]),
        ("float_val", c_void_p, [c_float]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Voice(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("features", c_void_p))


class _Wave(ctypes.Structure):
    _fields_ = (
        *(("type", c_char_p), ("sample_rate", c_int), ("n_samples", c_int), ("n_channels", c_int)),
        ("samples", POINTER(c_short)),
    )


@cache
def _flite_voice(name: str) -> int:
    _flite()
    register = getattr(ctypes.CDLL(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
    register.restype, register.argtypes = c_void_p, [c_char_p]
    return register(None)


def flite(text: str, voice: str, stretch: float = 1.0, pitch: float = 0.0) -> Speech:
    """English. voice: kal, kal16, awb, rms or slt. stretch: of the durations. pitch: mean, Hz; 0: the voice's own."""
    library, pointer = _flite(), _flite_voice(voice)
    features = _Voice.from_address(pointer).features
    library.feat_set(features, b"duration_stretch", library.float_val(stretch))
    if pitch:
        library.feat_set(features, b"int_f0_target_mean", library.float_val(pitch))
    utterance = library.flite_synth_text(text.encode(), pointer)
    wave = _Wave.from_address(library.utt_wave(utterance))
    samples = np.ctypeslib.as_array(wave.samples, (wave.n_samples,)).astype(np.float32) / 32768
    spoken = []
    item = library.relation_head(library.utt_relation(utterance, b"Word"))
    while item:
        first = library.ffeature_float(item, b"R:SylStructure.daughter1.daughter1.R:Segment.p.end")
        last = library.ffeature_float(item, b"R:SylStructure.daughtern.daughtern.R:Segment.end")
        spoken.append((library.ffeature_string(item, b"name").decode(), first, last))
        item = library.item_next(item)
    rate = wave.sample_rate
    library.delete_utterance(utterance)
    return _finish(samples, rate, _match(text, spoken))


def _match(text: str, spoken: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    """flite's words (letters alone, "it's" as two) joined to those of the text."""
    words, at = [], 0
    for word in text.split():
        letters, first = re.sub(r"\W", "", word).lower(), at
        have = ""
        while at < len(spoken) and len(have) < len(letters):
            have += re.sub(r"\W", "", spoken[at][0]).lower()
            at += 1
        if have != letters:
            raise ValueError(f"flite speaks {have!r} for {word!r} in {text!r}")
        words.append((word, spoken[first][1], spoken[at - 1][2]))
    return words


def _finish(samples: np.ndarray, rate: int, words: list[tuple[str, float, float]]) -> Speech:
    """Resamples to 16 kHz, trims silence and clips word times to the rest."""
    waveform = soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)
    waveform *= 0.5 / max(1e-6, np.abs(waveform).max())
    loud = np.flatnonzero(np.abs(waveform) > 0.005)
    first, last = loud[0], loud[-1] + 1
    start, end = first / SAMPLE_RATE, last / SAMPLE_RATE
    inside = []
    for word, a, b in words:
        a, b = np.clip([a, b], start, end)
        spoken = loud[(loud >= a * SAMPLE_RATE) & (loud < b * SAMPLE_RATE)]  # excludes a pause after the word
        b = spoken[-1] / SAMPLE_RATE if len(spoken) else b
        inside.append((word, round(float(a - start), 3), round(float(b - start), 3)))
    return Speech(waveform[first:last], inside)

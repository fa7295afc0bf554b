"""The long-form machinery against openai-whisper's own: transcribe() with one invented decoder and aligner behind both.

Every call for a window (place, length, prompt, temperature), every segment and every word must be the same over many
invented recordings and options, fallback, clips, words and hallucination skipping included; but that segments are
placed within the sound, and emptied ones left out (see `placing`).
"""

import itertools
import random
import sys
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import whisper.decoding
import whisper.timing

from tests.reference.placing import placed
from tests.transcription.scripted import scripted
from whisper_nnx import transcribe
from whisper_nnx.model.cache import KeysValues
from whisper_nnx.transcription import opening, row_times, stream
from whisper_nnx.transcription import recording as recording_module
from whisper_nnx.transcription.attempts import DecodingResult
from whisper_nnx.transcription.batch import Batch
from whisper_nnx.transcription.windows import EncodedWindows

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning", "ignore:.*digital silence")

theirs = sys.modules["whisper.transcribe"]  # the package has a function of that name
PIECES = [" hello", " world", ".", ' "', '"', " (", ")", ",", "?", "!", " the", " - ", " ¿", " 中", "文", "é", " "]
MOST_CALLS = 60


class Endless(Exception):
    """The reference does not come to an end on some recordings."""


class Invention:
    """A decoder and an aligner that make up, for each window of each case, one and the same nonsense."""

    def __init__(self, case: int, tokenizer):
        self.case, self.begin = case, tokenizer.special.timestamp_begin
        self.pieces = [tokenizer.encode(piece) for piece in PIECES]
        self.calls: list[tuple] = []

    def decode(self, start: int, n_frames: int, prompt, temperature: float) -> dict:
        prompt = tuple(prompt or ())[-223:]
        self.calls.append((start, n_frames, prompt, temperature))
        if len(self.calls) > MOST_CALLS:
            raise Endless
        dice = random.Random(repr((self.case, start, n_frames, prompt, temperature)))
        return {
            "tokens": self._tokens(dice, n_frames // 2),
            "avg_logprob": dice.uniform(-1.6, 0),
            "compression_ratio": dice.uniform(0.5, 3),
            "no_speech_prob": dice.choice([dice.random(), 0.01]),
            "temperature": temperature,
        }

    def _tokens(self, dice: random.Random, last: int) -> list[int]:
        def text() -> list[int]:
            return [token for _ in range(dice.choice([0, 1, 2, 3, 6])) for token in dice.choice(self.pieces)]

        if dice.random() < 0.1:
            return text()
        tokens: list[int] = []
        step = dice.choice([0, 0, 0, dice.randint(0, 50)])
        for _ in range(dice.randint(1, 5)):
            tokens += [self.begin + min(step, last), *text()]
            step += dice.randint(0, 400)
            if dice.random() < 0.93:
                tokens.append(self.begin + min(max(step, 1), last if dice.random() < 0.9 else 1500))
            step += dice.choice([0, 0, dice.randint(0, 200)])
        ending = dice.random()
        if ending < 0.3:
            return [*tokens, tokens[-1]]
        return [*tokens, self.begin + min(step, 1500), *text()] if ending < 0.5 else tokens

    def align(self, start: int, n_frames: int, text) -> tuple[list[float], list[float]]:
        dice = random.Random(repr((self.case, "times", start, n_frames, tuple(text))))
        last = max(1, n_frames // 2) - 1
        at = [dice.choice([0, dice.randint(0, last // 2)])]
        for _ in text:
            at.append(min(last, at[-1] + dice.choice([0, 3, 5, 10, 20, 150])))
        return [position / 50 for position in at], [dice.choice([0.05, 0.3, 0.9]) for _ in text]


def options_of(case: int) -> tuple[int, dict]:
    """Samples and options of a case."""
    dice = random.Random(case)
    samples = int(dice.choice([5, 29.99, 30, 45, 95.5, 130]) * 16_000) + dice.randint(0, 200)
    options = {
        "language": "en",
        "condition_on_previous_text": dice.random() < 0.7,
        "initial_prompt": dice.choice([None, "a name, Bob", " x " * 30]),
        "carry_initial_prompt": dice.random() < 0.3,
        "word_timestamps": dice.random() < 0.7,
        "temperature": dice.choice([0.0, (0.0, 0.4, 0.8), (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 0.7]),
        "logprob_threshold": dice.choice([-1.0, None, -0.5]),
        "no_speech_threshold": dice.choice([0.6, None]),
        "compression_ratio_threshold": dice.choice([2.4, None]),
    }
    if options["word_timestamps"]:
        options["hallucination_silence_threshold"] = dice.choice([None, 0.5, 1.0, 2.0])
    if dice.random() < 0.3:
        ends = sorted(round(dice.uniform(0, samples / 16_000), 2) for _ in range(dice.choice([1, 2, 3, 4])))
        options["clip_timestamps"] = ends if dice.random() < 0.5 else ",".join(map(str, ends))
    return samples, options


def their_transcript(invention: Invention, samples: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The reference on a mel whose frames are their own numbers."""

    def place(mel: torch.Tensor) -> tuple[int, int]:
        return int(mel[0, 0]) - 1, int((mel[0] > 0).sum())

    def decode(mel: torch.Tensor, o) -> whisper.decoding.DecodingResult:
        said = invention.decode(*place(mel), o.prompt, o.temperature)
        return whisper.decoding.DecodingResult(audio_features=mel, language="en", **said)

    def find_alignment(model, tokenizer, text, mel, n_frames, **_):
        if not text:
            return []
        begins, probs = invention.align(place(mel)[0], n_frames, text)
        words, groups = tokenizer.split_to_word_tokens([*text, tokenizer.eot])
        ends = np.cumsum([0, *(len(group) for group in groups[:-1])])
        return [
            whisper.timing.WordTiming(word, group, begins[a], begins[b], np.mean(probs[a:b]))
            for word, group, a, b in zip(words, groups, ends[:-1], ends[1:], strict=False)
        ]

    numbered = torch.arange(1, (samples + 480_000) // 160 + 1).float()[None].repeat(80, 1)
    monkeypatch.setattr(theirs, "log_mel_spectrogram", lambda audio, n_mels, padding: numbered)
    monkeypatch.setattr(whisper.timing, "find_alignment", find_alignment)
    model = SimpleNamespace(
        dims=SimpleNamespace(n_mels=80, n_audio_ctx=1500, n_text_ctx=448),
        device=torch.device("cpu"),
        is_multilingual=True,
        num_languages=99,
        decode=decode,
    )
    return theirs.transcribe(model, np.zeros(samples, np.float32), fp16=False, **options)


def our_transcript(model, invention: Invention, samples: int, options: dict, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Ours, where the place of a window stands in for its sound."""

    def encode(_, window) -> EncodedWindows:
        x = jnp.asarray(window, jnp.float32)
        return EncodedWindows(x, (KeysValues(x, x),))

    def decode(_, encoded, rows, seeds, meanwhile) -> list[DecodingResult]:
        places = np.asarray(encoded.cross[0].k, int).tolist()
        said = [invention.decode(*place, o.prompt, o.temperature) for place, o in zip(places, rows, strict=True)]
        return [DecodingResult(None, "en", **one) for one in said]

    def align(decoder, cross, config, *, texts, **_) -> list:
        places = np.asarray(cross[0].k, int).tolist()
        return [invention.align(*place, text) for place, text in zip(places, texts, strict=True)]

    def mel(waveform, n_mels, n_frames, together) -> SimpleNamespace:
        window, fingerprint = (lambda *place: np.array(place)), (lambda *place: 0)
        return SimpleNamespace(content_frames=len(waveform) // 160, window=window, fingerprint=fingerprint)

    monkeypatch.setattr(opening, "RecordingMel", mel)
    monkeypatch.setattr(stream, "Batch", partial(Batch, encode=encode, make_decoder=scripted(decode)))
    monkeypatch.setattr(row_times, "align_tokens", align)
    return transcribe(model, np.zeros(samples, np.float32), **options)


def plain(segment: dict) -> tuple:
    words = [
        (w["word"], *(round(float(w[key]), 6) for key in ("start", "end", "probability"))) for w in segment["words"]
    ]
    times = [round(float(segment[key]), 6) for key in ("start", "end", "avg_logprob", "no_speech_prob", "temperature")]
    return segment["id"], segment["seek"], segment["text"], list(segment["tokens"]), *times, words


def ends_s(calls: list[tuple]) -> dict[int, float]:
    """Where what the window at each first frame says has to end: with its sound, or where the next window begins."""
    windows = [(start, n) for start, n, *_ in dict.fromkeys((call[0], call[1]) for call in calls)]
    following = [start for start, _ in windows[1:]] + [0]
    return {
        start: (min(start + n, later) if later > start else start + n) / 100
        for (start, n), later in zip(windows, following, strict=True)
    }


@pytest.mark.parametrize("tenth", range(10))
def test_invented_recordings_take_the_same_course(tenth, model, monkeypatch):
    monkeypatch.setattr(recording_module, "SHORTEST_REST", 1)  # the reference decodes whatever is left
    compared = 0
    for case in range(tenth, 200, 10):
        samples, options = options_of(case)
        expected_by, ours_by = (Invention(case, model.tokenizer) for _ in range(2))
        try:
            expected = their_transcript(expected_by, samples, options, monkeypatch)
        except Endless:
            continue
        calls = expected_by.calls
        if any(a[0] == b[0] and a[3] >= b[3] for a, b in itertools.pairwise(calls)):
            continue  # it decoded a window that led nowhere once more, and by luck differently; ours goes on
        ours = our_transcript(model, ours_by, samples, options, monkeypatch)
        assert ours_by.calls == calls, case
        starts = [segment["tokens"][:1] for segment in expected["segments"]]
        if any(start and start[0] < expected_by.begin for start in starts):
            continue  # a pair of timestamps without one at the start: there the segment begins before the recording
        assert ours["text"] == expected["text"], case
        wanted = placed(expected["segments"], ends_s(calls))
        segments = [plain({"words": [], **segment}) for segment in ours["segments"]]
        assert segments == [plain({"words": [], **segment}) for segment in wanted], case
        compared += 1
    assert compared >= 12

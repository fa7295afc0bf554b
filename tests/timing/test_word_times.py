"""Words timed by short pieces of text and the audio's level."""

import numpy as np
import pytest

from tests.small import quick_compilation, small_config, small_tokenizer  # noqa: F401
from whisper_nnx import align, load_audio, load_model, transcribe
from whisper_nnx.model.config import RELEASED, RELEASED_ALIGNMENT_HEADS, RELEASED_SHORT_PIECE_HEADS
from whisper_nnx.timing.word_times import (
    PAUSE,
    Heads,
    Layout,
    SpelledWord,
    pause_scores,
    retime,
    short_pieces,
    spelled_words,
    word_heads,
)
from whisper_nnx.timing.words import WordTiming
from whisper_nnx.transcription.longform import LongformOptions


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.mark.parametrize("longest", [1, 2, 3])
@pytest.mark.parametrize("text", [" one", " theatre", "the (one)", " é—", ""])
def test_pieces_spell_the_text_in_few_letters_each(text, longest, tokenizer):
    pieces = short_pieces(tokenizer, text, longest)
    assert tokenizer.decode(pieces) == text
    assert all(len(tokenizer.decode([piece]).strip()) <= longest for piece in pieces)


def spelled(tokenizer, text: str) -> list[SpelledWord]:
    return [SpelledWord(f" {word}", tokenizer.encode(f" {word}")) for word in text.split()]


@pytest.mark.parametrize("n", [1, 4, 12, 24, 30])
def test_a_dense_text_takes_longer_pieces_rather_than_exceed_the_context(n, tokenizer):
    words = spelled(tokenizer, " ".join(["the one, two"] * n)) if n < 30 else spelled(tokenizer, "the " * 90)
    context = 2 + sum(len(word.ids) for word in words)  # what the text itself takes, and not one more
    layout = Layout.of(tokenizer, [tokenizer.special.sot], words, context, short=True)
    assert len(layout.ids) <= context
    assert len(layout.words) == len(words)
    roomy = Layout.of(tokenizer, [tokenizer.special.sot], words, 9 * context, short=True)
    assert len(roomy.rows) <= 2 * len(roomy.ids)
    short = short_pieces(tokenizer, " the", 3)
    assert roomy.ids[1 : 1 + len(short)] == list(short)


def test_heads_that_follow_short_pieces_are_known_for_the_sizes_that_were_measured():
    for name in ("tiny.en", "base"):
        assert word_heads(RELEASED[name]) == Heads(RELEASED_SHORT_PIECE_HEADS[name], True)
    assert word_heads(RELEASED["small"]) == Heads(RELEASED_ALIGNMENT_HEADS["small"], False)
    assert word_heads(small_config(alignment_heads=[[1, 1]])) == Heads(((1, 1),), False)  # its own: made for tokens
    assert word_heads(RELEASED["small"], [(3, 1), (2, 0)]) == Heads(((2, 0), (3, 1)), True)
    with pytest.raises(ValueError, match=r"\(9, 9\) does not exist"):
        word_heads(RELEASED["tiny.en"], [(9, 9)])


@pytest.mark.parametrize("noise", [1e-5, 0.003, 0.02])
def test_quiet_is_like_a_pause_and_speech_is_not_in_any_noise(noise):
    random = np.random.default_rng(0)
    samples = random.normal(0, noise, 48_000)
    samples[16_000:32_000] += random.normal(0, 0.1, 16_000)
    scores = pause_scores(samples, 0, 150)
    assert scores[:49].min() > PAUSE
    assert scores[51:99].max() < PAUSE
    assert scores[101:].min() > PAUSE
    np.testing.assert_allclose(pause_scores(samples, 8_000, 60)[26:58], scores[51:83])
    assert np.isfinite(pause_scores(np.zeros(100), 0, 4)).all()


def test_punctuation_is_timed_with_its_word(tokenizer):
    texts = [" (", "one", ",", " two", "."]
    words = [WordTiming(text, tokenizer.encode(text), 0.0, 0.0, 1.0) for text in texts]
    together, within = spelled_words(words)
    assert [word.text for word in together] == [" (one,", " two."]
    assert within == [0, 0, 0, 1, 1]
    retime(words, np.array([[0.2, 0.5], [1.0, 1.4]]))
    assert [(word.start, word.end) for word in words] == [(0.2, 0.2), (0.2, 0.5), (0.5, 0.5), (1.0, 1.4), (1.4, 1.4)]


def test_only_words_that_are_timed_can_be_refined():
    with pytest.raises(ValueError, match=r"refine_word_times=True .* set word_timestamps=True"):
        LongformOptions(refine_word_times=True)


SILENCES_S = (1.5, 3.0, 1.0)  # before each recording; the last one also behind the last
TEXTS = {
    "en_libri_5s.flac": "he began a confused complaint against the wizard who had vanished behind the curtain "
    "on the left",
    "en_lj_8s.wav": "unless a system is established for the frequent formal review of activities thereunder. "
    "in this regard",
}


@pytest.fixture(scope="module")
def with_pauses(real_tiny_en, real_speech) -> tuple:
    """A model; recordings with silence between; their text; where each starts and ends to speak."""
    audio, spans = [], []
    for name, silence_s in zip(TEXTS, SILENCES_S, strict=False):
        samples = load_audio(real_speech(name))
        level = np.convolve(np.square(samples), np.full(320, 1 / 320), "same")
        speech = np.flatnonzero(level > 10**-2.5 * np.percentile(level, 95))
        own = samples[speech[0] : speech[-1]]
        audio.append(np.random.default_rng(0).normal(0, 1e-4, round(silence_s * 16_000)).astype(np.float32))
        start = sum(map(len, audio)) / 16_000
        spans.append((start, start + len(own) / 16_000))
        audio.append(own)
    audio.append(np.zeros(round(SILENCES_S[-1] * 16_000), np.float32))
    return load_model(str(real_tiny_en)), np.concatenate(audio), spans


def check_pauses(words: list[dict], spans: list[tuple[float, float]]) -> None:
    starts, ends = (np.array([word[key] for word in words]) for key in ("start", "end"))
    onsets = np.array([np.abs(starts - start).min() for start, _ in spans])
    assert onsets.max() < 0.2
    silences = [(0.0, spans[0][0]), (spans[0][1], spans[1][0]), (spans[1][1], spans[1][1] + SILENCES_S[-1])]
    covered = sum(np.maximum(0, np.minimum(ends, b) - np.maximum(starts, a)).sum() for a, b in silences)
    assert covered < 0.25 * sum(b - a for a, b in silences)


@pytest.mark.real
def test_words_leave_out_the_silence_between_real_recordings(with_pauses):
    model, audio, spans = with_pauses
    aligned = align(model, audio, " ".join(TEXTS.values()))
    assert aligned["unspoken"] == []
    check_pauses(aligned["words"], spans)
    assert all(0.01 < word["probability"] <= 1 for word in aligned["words"])


@pytest.mark.slow
@pytest.mark.real
def test_refined_words_of_a_transcript_do_too(with_pauses):
    model, audio, spans = with_pauses
    transcript = transcribe(model, audio, word_timestamps=True, refine_word_times=True, temperature=0.0)
    words = [word for segment in transcript["segments"] for word in segment["words"]]
    check_pauses(words, spans)
    plain = transcribe(model, audio, word_timestamps=True, temperature=0.0)
    assert [w["word"] for w in words] == [w["word"] for s in plain["segments"] for w in s["words"]]
    for segment in transcript["segments"]:
        assert (segment["start"], segment["end"]) == (segment["words"][0]["start"], segment["words"][-1]["end"])

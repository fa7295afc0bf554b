"""Word times of a given transcript, and how likely transcripts are."""

import difflib
import json
from pathlib import Path

import numpy as np
import pytest

from whisper_nnx import DecodingOptions, decode, load_audio, load_model, log_mel_spectrogram, pad_or_trim, transcribe
from whisper_nnx.alignment.align import align
from whisper_nnx.alignment.likelihood import score
from whisper_nnx.alignment.pieces import quiet_cuts
from whisper_nnx.output.writers import to_srt
from whisper_nnx.text.words import normalized

NEVER_SPOKEN = ["Please", "call", "me", "tomorrow", "morning."]


@pytest.fixture(scope="module")
def model(digits):
    return load_model(str(digits))


def truth(shared: Path, name: str) -> tuple[Path, list[dict], str]:
    """A recording, its words with their times, its language."""
    stored = json.loads((shared / "audio" / f"{name}.words.json").read_text())
    return shared / "audio" / stored["recording"], stored["words"], stored["language"]


def boundary_errors(words: list[dict], true_words: list[dict]) -> np.ndarray:
    """Of the starts and ends of words that correspond, in s."""
    texts = [[normalized(word["word"]) for word in own] for own in (true_words, words)]
    blocks = difflib.SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks()
    pairs = [(true_words[a + i], words[b + i]) for a, b, n in blocks for i in range(n)]
    return np.array([abs(a[key] - b[key]) for a, b in pairs if b["start"] is not None for key in ("start", "end")])


@pytest.mark.parametrize(
    "name",
    [
        "en_pauses_60s",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("en_mixed_75s", "fr_40s", "mixed_languages_2min")),
        pytest.param("en_44k_stereo_25s", marks=pytest.mark.slow),
    ],
)
def test_word_times_of_a_known_text_are_at_least_as_good_as_a_transcripts(name, model, shared):
    path, words, language = truth(shared, name)
    language = None if name.startswith("mixed") else language
    aligned = align(model, path, " ".join(word["word"] for word in words), language=language)
    assert [word["word"].strip() for word in aligned["words"]] == [word["word"] for word in words]
    spoken = [word for word in aligned["words"] if word["start"] is not None]
    times = [word[key] for word in spoken for key in ("start", "end")]
    assert times == sorted(times)
    transcript = transcribe(model, path, word_timestamps=True, temperature=0.0, language=language)
    recognized = [word for segment in transcript["segments"] for word in segment["words"]]
    errors = boundary_errors(aligned["words"], words)
    assert len(errors) >= len(boundary_errors(recognized, words))
    assert np.median(errors) <= np.median(boundary_errors(recognized, words))


@pytest.fixture(scope="module")
def with_a_lie(model, shared):
    """A recording's true words, and the alignment of a text with a sentence that it never says."""
    path, words, language = truth(shared, "en_mixed_75s")
    texts = [word["word"] for word in words]
    return words, align(model, path, " ".join([*texts[:30], *NEVER_SPOKEN, *texts[30:]]), language=language)


def test_a_sentence_that_was_never_spoken_is_reported_and_hardly_anything_else(with_a_lie):
    words, aligned = with_a_lie
    lie = aligned["words"][30:35]
    assert [(word["start"], word["end"]) for word in lie] == [(None, None)] * 5
    assert any(" ".join(NEVER_SPOKEN) in stretch for stretch in aligned["unspoken"])
    others = [*aligned["words"][:30], *aligned["words"][35:]]
    assert sum(word["start"] is None for word in others) <= 0.03 * len(words)
    assert np.median(boundary_errors(others, words)) < 0.25


def test_segments_contain_the_spoken_words_and_can_be_written(with_a_lie):
    _, aligned = with_a_lie
    spoken = [word for word in aligned["words"] if word["start"] is not None]
    assert [word for segment in aligned["segments"] for word in segment["words"]] == spoken
    assert aligned["text"] == "".join(word["word"] for word in spoken)
    for segment in aligned["segments"]:
        assert (segment["start"], segment["end"]) == (segment["words"][0]["start"], segment["words"][-1]["end"])
    assert "<u>nine</u>" in to_srt(aligned, highlight_words=True)


@pytest.mark.filterwarnings("ignore:.*digital silence")
def test_nothing_is_spoken_in_silence(model, shared):
    aligned = align(model, shared / "audio" / "silence_12s.flac", "one two three", language="en")
    assert aligned["unspoken"] == ["one two three"]
    assert aligned["segments"] == []


def test_a_recording_is_cut_where_it_is_quiet():
    samples = np.random.default_rng(0).normal(size=100 * 160).astype(np.float32)
    samples[6000:9600] *= 0.01
    pieces = quiet_cuts(samples, 100, 70)
    assert [n for _, n in pieces] == [b - a for (a, _), (b, _) in zip(pieces, [*pieces[1:], (100, 0)], strict=True)]
    assert 6000 / 160 < pieces[1][0] < 9600 / 160


def test_what_cannot_be_aligned_is_refused_in_one_line(model):
    audio = np.ones(16_000, np.float32)
    with pytest.raises(ValueError, match="has no words"):
        align(model, audio, " \n")
    with pytest.raises(ValueError, match="klingon"):
        align(model, audio, "one", language="klingon")
    with pytest.raises(ValueError, match="batch_size=0"):
        align(model, audio, "one", batch_size=0)
    with pytest.raises(ValueError, match="alignment_heads=9 top layers"):
        align(model, audio, "one", alignment_heads=9)


def test_a_greedy_texts_score_is_what_the_decoder_gave_it(model, shared):
    path, _, language = truth(shared, "en_short_3s")
    mel = log_mel_spectrogram(pad_or_trim(load_audio(path)))
    options = DecodingOptions(language=language, without_timestamps=True, suppress_blank=False, suppress_tokens=())
    result = decode(model, mel, options)
    [scored] = score(model, path, [result.tokens], language=language)
    np.testing.assert_allclose(scored.token_logprobs, result.token_logprobs, atol=1e-3)
    assert scored.avg_logprob == pytest.approx(result.avg_logprob, abs=1e-3)


def test_the_true_text_is_likelier_than_its_words_in_another_order(model, shared):
    names = ["en_short_3s", "en_quick_20s"]
    recordings = [truth(shared, name) for name in names]
    texts = [" ".join(word["word"] for word in words) for _, words, _ in recordings]
    shuffled = [" ".join(reversed(text.split())) for text in texts]
    pairs = [[text, other] for text, other in zip(texts, shuffled, strict=True)]
    scores = score(model, [path for path, _, _ in recordings], pairs, language="en")
    for true, other in scores:
        assert true.logprob > other.logprob

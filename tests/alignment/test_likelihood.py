"""Teacher forcing of made-up texts on a small model: batches, limits, compilations."""

import numpy as np
import pytest

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx.alignment.align import Reader, align
from whisper_nnx.alignment.likelihood import classify, score
from whisper_nnx.alignment.pieces import RecognizedWord, transcribe_pieces
from whisper_nnx.timing.word_times import word_heads


def noise(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, n).astype(np.float32)


@pytest.fixture(scope="module")
def small():
    return small_model(alignment_heads=[[1, 0], [1, 1]])


def test_scores_do_not_depend_on_their_company(small):
    recordings = [noise(16_000, seed) for seed in range(2)]
    texts = [["one two", "three", "and the one"], ["two"]]
    together = score(small, recordings, texts, language="de", batch_size=3)
    for recording, own, expected in zip(recordings, texts, together, strict=True):
        for text, other in zip(own, expected, strict=True):
            [alone] = score(small, recording, [text], language="de")
            assert alone.tokens == other.tokens
            np.testing.assert_allclose(alone.token_logprobs, other.token_logprobs, atol=1e-4)
            assert alone.end_logprob == pytest.approx(other.end_logprob, abs=1e-4)


def test_texts_of_other_lengths_compile_nothing_anew(small, compilations):
    audio = noise(16_000)
    score(small, audio, ["one two", "three"], language="de", batch_size=2)
    compilations.clear()
    score(small, audio, ["and the one two", "one", "two and three"], language="es", batch_size=2)
    assert compilations == []


def test_phrases_have_probabilities_in_proportion_to_their_likelihoods(small):
    recordings, phrases = [noise(16_000, seed) for seed in range(2)], ["one", "the two", "and"]
    for recording, found in zip(recordings, classify(small, recordings, phrases, language="de"), strict=True):
        assert list(found) == phrases
        assert sum(found.values()) == pytest.approx(1)
        logprobs = [one.logprob for one in score(small, recording, phrases, language="de")]
        likelihoods = np.exp(logprobs)
        assert list(found.values()) == pytest.approx((likelihoods / likelihoods.sum()).tolist(), rel=1e-3)
        assert classify(small, recording, phrases, language="de") == pytest.approx(found, rel=1e-3)
    for wrong in ([], "one", ["one", "one"], ["one", "one "]):
        with pytest.raises(ValueError, match="must be a list of different texts"):
            classify(small, recordings, wrong, language="de")


def test_what_cannot_be_scored_is_refused_in_one_line(small):
    audio = noise(16_000)
    with pytest.raises(ValueError, match="is empty"):
        score(small, audio, ["one", "  "], language="de")
    with pytest.raises(ValueError, match="exceeds the context of 48"):
        score(small, audio, ["one " * 50], language="de")
    with pytest.raises(ValueError, match="longer than a window of 1 s"):
        score(small, noise(20_000), ["one"], language="de")
    with pytest.raises(ValueError, match="1 recordings, but 2 lists"):
        score(small, [audio], [["one"], ["two"]])


def test_a_text_beyond_the_context_is_read_as_far_as_it_fits(small):
    """Random weights say anything: what counts is that no piece is given more than it can hold."""
    aligned = align(small, noise(40_000), "one two and " * 60, language="de")
    assert len(aligned["words"]) == 180


def test_pieces_read_together_are_read_as_one_by_one(small):
    """As random weights recognize nonsense, the recognized words are made up."""
    alone, together = (transcribe_pieces(small, noise(40_000), "de", "transcribe", size) for size in (1, 2))
    assert len(alone) == 3
    assert [(piece.start_frame, piece.recognized) for piece in alone] == [
        (p.start_frame, p.recognized) for p in together
    ]
    words = [" one", " two", " and", " the", " two", " one", " two,", " one", " and."]
    for pieces in (alone, together):
        for i, piece in enumerate(pieces):
            piece.recognized = [RecognizedWord(word, 0.1, 0.4) for word in words[3 * i : 3 * i + 3]]
    timed = []
    for size, pieces in ((1, alone), (2, together)):
        reader = Reader(small, pieces, [*words[:4], " never", *words[4:]], "transcribe", size)
        owner, _ = reader.owners()
        assert [p for p in owner.tolist() if p >= 0] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        timed.append(reader.times(owner, word_heads(small.config)))
    np.testing.assert_allclose(*timed, atol=1e-4)
    times_s = timed[0][np.isfinite(timed[0][:, 0]), :2].ravel()
    assert (np.diff(times_s) >= 0).all()

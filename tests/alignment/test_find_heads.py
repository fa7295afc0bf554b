"""Attention heads that follow the audio: found by measurement."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import load_model
from whisper_nnx.alignment.align import Reader
from whisper_nnx.alignment.find_heads import find_alignment_heads
from whisper_nnx.alignment.pieces import transcribe_pieces
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.model.heads import Heads
from whisper_nnx.timing.token_times import align_tokens
from whisper_nnx.timing.words import words_from_tokens

NAMES = ("en_44k_stereo_25s", "en_one_speaker_30s", "en_quick_20s", "en_short_3s")  # those of up to 30 s


@pytest.fixture(scope="module")
def model(digits):
    return load_model(str(digits))


@pytest.fixture(scope="module")
def recordings(shared) -> list[tuple]:
    """(audio, text, words with their times)."""
    stored = [json.loads((shared / "audio" / f"{name}.words.json").read_text()) for name in NAMES]
    return [
        (shared / "audio" / it["recording"], " ".join(word["word"] for word in it["words"]), it["words"])
        for it in stored
    ]


@pytest.fixture(scope="module")
def median_error_s(model, recordings) -> Callable[[Heads], float]:
    """Of word boundaries, as a transcript with the right words would have them."""
    tokenizer, prepared = model.tokenizer, []
    for path, text, words in recordings:
        pieces = transcribe_pieces(model, load_audio(path), "en", "transcribe", 1)
        reader = Reader(model, pieces, [" " + word for word in text.split()], "transcribe", 1)
        spelled, _, _ = reader.spellings(np.arange(len(words)))
        ids = [token for word in spelled for token in tokenizer.encode(word)]
        prepared.append((reader.cross([0]), ids, [len(pieces[0].pauses)], words))

    def measure(heads: Heads) -> float:
        start, eot, errors = tokenizer.sot_sequence("en", timestamps=False), tokenizer.special.eot, []
        for cross, ids, positions, words in prepared:
            text = {"starts": [start], "texts": [ids], "positions": positions, "eot": eot}
            [times] = align_tokens(model.decoder, cross, model.config, **text, heads=heads)
            timed = [w for w in words_from_tokens(tokenizer, ids, *times, "en") if w.word.strip() not in ".,?!"]
            errors += [(w.start - t["start"], w.end - t["end"]) for w, t in zip(timed, words, strict=True)]
        return float(np.median(np.abs(errors)))

    return measure


@pytest.mark.slow
@pytest.mark.parametrize("with_times", [True, False])
def test_heads_that_are_found_time_words_at_least_as_well_as_the_checkpoints_own(
    with_times, model, recordings, median_error_s
):
    given = recordings if with_times else [recording[:2] for recording in recordings]
    found = find_alignment_heads(model, given, n=3, language="en")
    assert len(set(found)) == 3
    assert replace(model.config, alignment_heads=found).alignment_heads == found
    own = model.config.alignment_heads
    assert own == ((1, 0), (2, 0), (2, 1))
    assert median_error_s(found) <= median_error_s(own)


def test_heads_are_found_in_their_order_of_merit(model, recordings):
    few = find_alignment_heads(model, recordings[-1:], n=2, language="en")
    assert find_alignment_heads(model, recordings[-1:], n=5, language="en")[:2] == few


def test_recordings_that_cannot_rank_heads_are_refused():
    small = small_model()
    audio = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    with pytest.raises(ValueError, match="n=9 heads, but the decoder has 4"):
        find_alignment_heads(small, [(audio, "one")], n=9)
    with pytest.raises(ValueError, match=r"recording 0 has 2.00 s .* at most 1 s"):
        find_alignment_heads(small, [(np.tile(audio, 2), "one")], n=1)
    with pytest.raises(ValueError, match="the text '  '"):
        find_alignment_heads(small, [(audio, "  ")], n=1)
    with pytest.raises(ValueError, match="0 recordings"):
        find_alignment_heads(small, [], n=1)
    with pytest.raises(ValueError, match="2 words, but times of 1"):
        find_alignment_heads(small, [(audio, "one two", [{"start": 0.1, "end": 0.2}])], n=1, language="de")

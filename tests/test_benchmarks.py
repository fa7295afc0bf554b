"""The benchmarks' own parts: loops are told apart, sound is cut without loss, documents hold what was measured."""

import json

import numpy as np
import pytest

from benchmarks import speech, tables
from benchmarks.scoring import score, without_loops, write_result
from benchmarks.systems import FORMATS, ON_REQUEST, SYSTEMS, Work, chosen, formats, is_able


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("no no no", "no no no"),
        ("no no no no", "no"),
        ("a b c b c b c b c b d", "a b c d"),  # with the beginning of another round
        ("we ask and ask and ask and we ask", "we ask and ask and ask and we ask"),
        (" ".join([*map(str, range(16))] * 4), " ".join(map(str, range(16)))),
        ("", ""),
    ],
)
def test_a_phrase_four_times_in_a_row_is_left_once(text, left):
    words = text.split()
    kept, removed = without_loops(words)
    assert kept == left.split()
    assert removed == len(words) - len(kept)


def test_a_loop_is_no_error_and_every_word_is_counted():
    found = score(["He sees sees sees sees a dog.", "真昼"], ["He saw a big dog.", "真っ昼"], ["en", "ja"])
    assert found == {
        "words": 9,
        "spoken": 8,
        "substitutions": 1,
        "deletions": 2,
        "insertions": 0,
        "loop_words": 3,
        "loops": 1,
    }


def test_clips_hold_all_of_the_sound_and_are_cut_where_it_is_quiet():
    audio = np.random.default_rng(0).normal(0, 0.1, 80 * 16_000).astype(np.float32)
    audio[25 * 16_000 : 26 * 16_000] = 0
    clips = speech.cut(audio)
    np.testing.assert_array_equal(np.concatenate(clips), audio)
    assert max(map(len, clips)) <= 30 * 16_000
    assert 25.0 <= len(clips[0]) / 16_000 <= 26.0


def test_noise_stands_below_speech_by_what_was_asked_for():
    speaker = speech.Recording(np.sin(np.arange(16_000)).astype(np.float32), "a", "en", "name")
    noise = speech.noisy(speaker, 5.0).audio - speaker.audio
    assert 10 * np.log10((speaker.audio**2).mean() / (noise**2).mean()) == pytest.approx(5, abs=0.01)


def test_every_sound_without_speech_is_as_long_as_asked_for_and_within_full_scale():
    for name, sound in speech.speechless(2.0).items():
        assert sound.shape == (32_000,), name
        assert sound.dtype == np.float32
        assert np.abs(sound).max() <= 1, name


def test_systems_that_are_slow_somewhere_run_only_when_named():
    assert set(chosen("")) == set(SYSTEMS) - set(ON_REQUEST)
    assert chosen("^transformers, bfloat16$")[-1] == "transformers, bfloat16"
    assert formats(list(SYSTEMS)) == set(FORMATS.values())
    assert is_able("faster-whisper, batched", Work(vad=True, batch_size=8))
    assert not is_able("faster-whisper, batched", Work())  # of a long clip it would transcribe the first 30 s
    assert not is_able("faster-whisper, batched", None)
    assert is_able("whisper.cpp, f16", Work())
    assert not is_able("whisper.cpp, f16", Work(words=True))


def test_tables_show_seconds_beside_the_words_written(tmp_path):
    row = {"s": 2.0, "runs": 5, "first_s": 3.5, "mb": 400, "tokens": 9}
    row |= {"words": 9, "spoken": 10, "substitutions": 1, "deletions": 1, "insertions": 0, "loop_words": 0, "loops": 0}
    systems = {"whisper_nnx": row, "peer, int8": row | {"s": 4.0}}
    found = {"one window": {"audio_s": 23.5, "systems": systems}}
    versions = {"whisper_nnx": "1", "peer, int8": "2"}
    write_result(tmp_path / "base.timings.json", "base", versions, timings=found)
    text = tables.filled("a\n<!-- table base.timings -->\nold\n<!-- end -->\nb\n", tmp_path)
    assert "| peer, int8 | 4.00 | 0.50 | 9 | 20.0 % | 400 | 3.50 |" in text
    assert "words of 10" in text
    assert "old" not in text
    assert json.loads((tmp_path / "base.timings.json").read_text())["date"] in text
    assert tables.filled(text, tmp_path) == text
    assert "| peer, int8 | 4.00 |  |" in tables.filled("<!-- table base.summary -->\n<!-- end -->\n", tmp_path)


@pytest.mark.parametrize("document", tables.DOCUMENTS)
def test_documents_hold_the_tables_of_the_results(document):
    text = (tables.ROOT / document).read_text()
    assert tables.filled(text) == text, "run python benchmarks/tables.py"

"""Windows of recordings identified by their level; the model's window is one second long."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.small import TIMESTAMPS, small_tokenizer
from tests.training.waveforms import RATE, level, steady, stretches, write
from whisper_nnx.audio.loading import load_audio
from whisper_nnx.data.manifest import Row, Span
from whisper_nnx.training.config import AugmentConfig, DataConfig
from whisper_nnx.training.windows import Windows

TOKENIZER = small_tokenizer()
SPECIAL = TOKENIZER.special
STEP = RATE // 50  # samples of a position
PLAIN: dict[str, Any] = {
    "window_s": 1.0,
    "no_speech_rate": 0.0,
    "previous_text_rate": 0.0,
    "no_timestamps_rate": 0.0,
    "max_label_length": 48,
    "pack_gap_s": (0.02, 0.1),
}


def level_rows(folder: Path, shortest: float) -> list[Row]:
    """Row k has the letter k as text and `level(k)`, and is 30 ms longer than the previous one."""
    made = []
    for k in range(8):
        seconds = shortest + 0.03 * k
        path = write(folder, f"{k}.wav", steady(k, seconds))
        made.append(Row(path, "abcdefgh"[k], "en", seconds, k + 1, manifest="m"))
    return made


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    return level_rows(tmp_path, 0.14)


def windows(rows: list[Row], augment: AugmentConfig | None = None, seed: int = 0, **changes: Any) -> Windows:
    config = DataConfig(**{**PLAIN, **changes})
    return Windows(config, augment or AugmentConfig(), rows, TOKENIZER, seed, max_target_positions=48)


def some(it: Windows, count: int = 60) -> list[dict[str, np.ndarray]]:
    return [it(index, index % len(it.rows)) for index in range(count)]


def learned(window: dict[str, np.ndarray]) -> str:
    return TOKENIZER.decode_with_timestamps(window["labels"][window["weights"] > 0].tolist())


def content(window: dict[str, np.ndarray]) -> list[int]:
    """Labels after the task."""
    labels = window["labels"][window["weights"] > 0].tolist()
    return labels[2:]


def row_of(loudness: float) -> int:
    """The row with this level."""
    return round(loudness * 64) - 1


def segments(window: dict[str, np.ndarray]) -> list[tuple[int, str, int | None]]:
    """(start, text, end) of labelled segments in positions; end None: partial."""
    found, begin, letters = [], None, ""
    for token in content(window):
        at = token - SPECIAL.timestamp_begin
        if not TOKENIZER.is_timestamp(token):
            if token == SPECIAL.eot and begin is not None:
                found.append((begin, letters, None))
            letters += TOKENIZER.decode([token])
        elif begin is None:
            begin, letters = at, ""
        else:
            found.append((begin, letters, at))
            begin = None
    return found


def test_packed_rows_are_at_their_labelled_times(rows):
    many = some(windows(rows))
    assert max((window["rows"] >= 0).sum() for window in many) >= 4
    assert min((window["rows"] >= 0).sum() for window in many) == 1
    for window in many:
        labelled, parts = segments(window), stretches(window["waveform"])
        assert len(labelled) == len(parts) == (window["rows"] >= 0).sum()
        for (begin, text, end), (first, last, loudness), index in zip(labelled, parts, window["rows"], strict=False):
            assert row_of(loudness) == index
            assert abs(first - begin * STEP) <= STEP // 2 + 1
            if end is not None:
                assert text == f" {rows[index].text}"
                assert abs(last - end * STEP) <= STEP // 2 + 1
                assert last - first == len(load_audio(rows[index].audio))


def test_a_row_that_does_not_fit_is_cut_and_only_its_start_is_labelled(tmp_path):
    rows = level_rows(tmp_path, 0.4)
    partial = [window for window in some(windows(rows)) if segments(window)[-1][2] is None]
    assert 10 < len(partial) < 50
    for window in partial:
        first, last, loudness = stretches(window["waveform"])[-1]
        whole = len(load_audio(rows[row_of(loudness)].audio))
        assert last == RATE  # up to the window's end
        assert last - first < whole
        assert last - first >= 0.2 * RATE - STEP
        assert segments(window)[-1][1] == ""
        assert sum(end is None for _, _, end in segments(window)) == 1
        assert window["ctc_weight"] == 0


def test_without_timestamps_nothing_is_cut(rows):
    many = some(windows(rows, no_timestamps_rate=1.0))
    assert max((window["rows"] >= 0).sum() for window in many) >= 4
    for window in many:
        parts = stretches(window["waveform"])
        text = "".join(f" {rows[row_of(loudness)].text}" for _, _, loudness in parts)
        assert learned(window) == f"<|en|><|transcribe|><|notimestamps|>{text}<|endoftext|>"
        for first, last, loudness in parts:
            assert last - first == len(load_audio(rows[row_of(loudness)].audio))
        assert window["ctc_weight"] == 1


def test_the_share_of_windows_without_timestamps_is_the_rate(rows):
    many = some(windows(rows, no_timestamps_rate=0.5), 200)
    assert 70 < sum(SPECIAL.no_timestamps in window["ids"] for window in many) < 130


def test_unpacked_windows_start_with_their_only_row(rows):
    for index, window in enumerate(some(windows(rows, pack=False))):
        ((begin, _, end),) = segments(window)
        assert begin == 0
        assert end == pytest.approx(rows[index % 8].duration * 50, abs=0.51)
        assert window["rows"].tolist() == [index % 8, *[-1] * 7]


def test_only_rows_of_one_group_share_a_window(rows):
    kinds = [{}, {"language": "de"}, {"task": "translate"}, {"source": "phone"}]
    mixed = [replace(row, **kinds[i % 4]) for i, row in enumerate(rows)]
    shared = 0
    for window in some(windows(mixed)):
        indices = [index for index in window["rows"].tolist() if index >= 0]
        assert len({index % 4 for index in indices}) == 1
        row = mixed[indices[0]]
        assert learned(window).startswith(f"<|{row.language}|><|{row.task}|>")
        shared += len(set(indices)) > 1
    assert shared


def test_times_words_and_spans_follow_the_speed(rows):
    timed = [replace(row, words=(Span(0.04, 0.1, row.text),)) for row in rows]
    lengths = set()
    for window in some(windows(timed, AugmentConfig(speed=0.3), pack_gap_s=(0.0, 0.0), pack=False)):
        (index, *_) = window["rows"]
        ((_, _, end),) = segments(window)
        quiet = np.flatnonzero(np.abs(window["waveform"]) < level(index) / 2)
        assert quiet[quiet > 100][0] == pytest.approx(end * STEP, abs=STEP / 2 + 2)
        speed = timed[index].duration * RATE / quiet[quiet > 100][0]
        letter = window["labels"].tolist().index(TOKENIZER.encode(f" {timed[index].text}")[-1])
        assert window["spans"][letter] == pytest.approx([0.04 * 50 / speed, 0.1 * 50 / speed], abs=1.01)
        lengths.add(round(speed, 1))
    assert {0.7, 1.3} <= lengths


def test_a_row_that_fits_is_not_slowed_beyond_the_window(tmp_path):
    row = Row(write(tmp_path, "a.wav", steady(0, 0.97)), "a", "en", 0.97, 1)
    for window in some(windows([row], AugmentConfig(speed=0.3)), 20):
        assert segments(window)[0][1] == " a"
        assert segments(window)[0][2] is not None


def test_short_clips_are_placed_at_random_and_half_of_them_at_the_start(rows):
    it = windows(rows, window_s=0.4)
    many = some(it, 400)
    first = np.array([window["first_position"] for window in many])
    assert 160 < (first == 0).sum() < 240
    assert set(first.tolist()) == set(range(31))
    for window in many:
        assert window["waveform"].shape == (0.4 * RATE,)
        (begin, *_), (first_sample, *_) = segments(window)[0], stretches(window["waveform"])[0]
        assert begin - window["first_position"] == pytest.approx(first_sample / STEP, abs=0.51)
        assert window["spans"].max() <= 20


def test_segments_of_a_longer_row_are_used_as_far_as_they_fit(tmp_path):
    spans = (Span(0.0, 0.2, "a"), Span(0.2, 0.35, "b"), Span(0.4, 0.9, "c"), Span(0.9, 1.0, "d"))
    row = Row(write(tmp_path, "a.wav", steady(0, 1.0)), "a b c d", "en", 1.0, 1, segments=spans)
    plain: dict[str, Any] = {"window_s": 0.8, "pack": False}
    (window,) = some(windows([row], **plain), 1)
    offset = int(window["first_position"])
    assert [(a - offset, t, b and b - offset) for a, t, b in segments(window)] == [
        (0, " a", 10),
        (10, " b", 18),
        (20, "", None),
    ]
    assert stretches(window["waveform"])[-1][1] == 0.8 * RATE
    (without,) = some(windows([row], **plain, no_timestamps_rate=1.0), 1)
    assert learned(without).endswith("<|notimestamps|> a b<|endoftext|>")
    assert stretches(without["waveform"])[-1][1] == 0.4 * RATE  # audio without a label is dropped


def test_a_long_row_without_a_fitting_segment_is_reported_and_has_no_weight(rows, tmp_path):
    long = Row(write(tmp_path, "a.wav", steady(0, 0.9)), "a", "en", 0.9, 1)
    window = windows([*rows, long], window_s=0.5)(0, 8)
    assert str(window["trouble"]).startswith("8\tlasts 0.9 s, and no segment of it ends within window_s=0.5")
    assert not window["weights"].any()


def test_too_long_text_is_reported_and_has_no_weight(rows):
    rows[3] = replace(rows[3], text="x" * 50)
    window = windows(rows)(0, 3)
    assert "does not fit into max_label_length=48" in str(window["trouble"])
    assert not window["weights"].any()
    assert not window["waveform"].any()


def test_labels_never_exceed_their_limit(rows):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        wordy = [replace(row, text="x" * int(rng.integers(1, 8)), previous_text="y" * 30) for row in rows]
        it = windows(wordy, AugmentConfig(speed=0.2), seed, max_label_length=24, previous_text_rate=0.7)
        for window in some(it):
            assert window["labels"].shape == window["ids"].shape == (24,)
            assert window["labels"][window["weights"] > 0][-1] == SPECIAL.eot
            assert 0 <= window["ids"].min() <= window["ids"].max() <= SPECIAL.timestamp_end


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_synthetic_windows_without_speech(rows, rate):
    for index, window in enumerate(some(windows(rows, no_speech_rate=1.0, no_timestamps_rate=rate))):
        timed = SPECIAL.no_timestamps not in window["ids"]
        assert learned(window) == "<|nospeech|>" + ("<|0.00|>" if timed else "<|notimestamps|>") + "<|endoftext|>"
        assert (window["rows"] == -1).all()
        assert window["ctc_weight"] == 1
        assert np.abs(window["waveform"]).max() < 0.6, index


def test_recorded_windows_without_speech(rows, tmp_path):
    quiet = Row(write(tmp_path, "quiet.wav", steady(9, 1.3)), "", "", 1.3, 9, no_speech=True)
    window = windows([*rows, quiet])(5, 8)
    assert learned(window) == "<|nospeech|><|0.00|><|endoftext|>"
    assert window["rows"][0] == 8
    assert window["waveform"] == pytest.approx(level(9), abs=1e-4)
    alone = windows([quiet])(5, 0)
    assert learned(alone) == learned(window)


def test_a_missing_file_is_reported_and_has_no_weight(rows):
    rows[2].audio.unlink()
    window = windows(rows)(0, 2)
    assert str(window["trouble"]).startswith(f"2\t{rows[2].audio}: No such file")
    assert not window["weights"].any()
    assert window["ctc_weight"] == 0
    assert not window["waveform"].any()
    assert (window["rows"] == -1).all()
    others = some(windows(rows))
    assert all(2 not in window["rows"] for window in others)
    assert sum(bool(str(window["trouble"])) and window["weights"].any() for window in others)  # the rest is used


def test_previous_text_is_the_rows_own_or_from_its_group(rows):
    own = [replace(row, previous_text=f"{row.text}{row.text}") for row in rows]
    for index, window in enumerate(some(windows(own, previous_text_rate=1.0))):
        assert window["ids"][0] == SPECIAL.sot_prev
        assert TOKENIZER.decode(window["ids"][1:].tolist()).startswith(f" {own[index % 8].previous_text}<|start")
    mixed = [replace(row, language="ende"[i % 2 * 2 :][:2]) for i, row in enumerate(rows)]
    others = set()
    for index, window in enumerate(some(windows(mixed, previous_text_rate=1.0))):
        if window["ids"][0] == SPECIAL.sot_prev:
            ids = window["ids"].tolist()
            letters = set(TOKENIZER.decode(ids[1 : ids.index(SPECIAL.sot)])) - {" "}
            assert {"abcdefgh".index(letter) % 2 for letter in letters} == {index % 2}
            assert "abcdefgh"[index % 8] not in letters
            others |= letters
    assert others == set("abcdefgh")
    assert all(window["ids"][0] == SPECIAL.sot for window in some(windows(own)))


@pytest.mark.parametrize("no_timestamps_rate", [0.0, 1.0])
def test_previous_text_of_other_rows_has_timestamps_like_the_window(rows, no_timestamps_rate):
    timed = 0
    made = some(windows(rows, previous_text_rate=1.0, no_timestamps_rate=no_timestamps_rate), 200)
    for window in made:
        ids = window["ids"].tolist()
        before = ids[1 : ids.index(SPECIAL.sot)]
        times = [token - SPECIAL.timestamp_begin for token in before if token >= SPECIAL.timestamp_begin]
        timed += bool(times)
        steps = np.diff(times)
        assert all(0 <= time <= TIMESTAMPS for time in times)
        assert (steps < 0).sum() <= len(times) // 4  # they restart in each window
    assert 0.7 * len(made) < timed < 0.9 * len(made) if no_timestamps_rate == 0 else timed == 0


def test_a_window_depends_only_on_its_index_and_the_seed(rows):
    augment = AugmentConfig(speed=0.1, gain_db=6, noise_rate=0.5)
    changes = {"no_speech_rate": 0.2, "previous_text_rate": 0.5, "no_timestamps_rate": 0.5}
    it, again = windows(rows, augment, **changes), windows(rows, augment, **changes)
    forward = some(it, 20)
    backward = [again(index, index % 8) for index in reversed(range(20))][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    others = some(windows(rows, augment, seed=1, **changes), 20)
    assert sum(np.array_equal(a["waveform"], b["waveform"]) for a, b in zip(forward, others, strict=True)) < 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window_s": 1.02}, "window_s=1.02 must be a multiple of 0.02 s up to 1"),
        ({"window_s": 0.51}, "window_s=0.51"),
        ({"window_s": 0.0}, "window_s=0.0"),
        ({"max_label_length": 49}, "max_label_length=49 must be from 8 to the model's 48"),
    ],
)
def test_invalid_options_are_rejected_before_reading(rows, changes, reason):
    with pytest.raises(ValueError, match=reason):
        windows(rows, **changes)


def test_languages_that_the_model_lacks_are_rejected_at_once(rows):
    with pytest.raises(ValueError, match="'ja' is not in this checkpoint"):
        windows([replace(rows[0], language="ja")])
    assert SPECIAL.timestamp_end - SPECIAL.timestamp_begin == TIMESTAMPS - 1

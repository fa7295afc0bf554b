"""Bars, labels, limits and paths that the plots contain; not their appearance."""

import random
from itertools import combinations

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text

from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import decode
from whisper_nnx.alignment.window import Alignment, align_window
from whisper_nnx.audio import features
from whisper_nnx.audio.features import RecordingMel
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.output import plotting
from whisper_nnx.output.plotting import plot_alignment, plot_mel, plot_probabilities, plot_transcript, plot_words

SAMPLES = np.sin(np.arange(48_000, dtype=np.float32) / 20)  # 3 s


def word(text: str, start: float, end: float, probability: float = 0.5) -> dict:
    return {"word": f" {text}", "start": start, "end": end, "probability": probability}


def transcript(*segments: dict) -> dict:
    return {"text": "", "language": "en", "segments": list(segments)}


def segment(text: str, start: float, end: float, words: tuple | list = ()) -> dict:
    return {"text": text, "start": start, "end": end, "avg_logprob": np.log(0.25), "words": words}


ONE_TWO = [word("one", 0.2, 0.6, 0.0), word("two", 0.8, 1.2, 1.0)]


def bars(ax: Axes) -> np.ndarray:
    """Start and end [N,2] of each bar above the plot."""
    [collection] = [c for c in ax.collections if c.get_label() == "words"]
    return np.array([path.get_extents().intervalx for path in collection.get_paths()])


def labels(ax: Axes) -> list[Text]:
    return [text for text in ax.texts if text.get_gid() == "label"]


def label_texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in labels(ax)]


def test_each_word_has_a_bar_over_its_time_and_a_label():
    ax = plot_words(SAMPLES, transcript(segment(" one two", 0, 2, ONE_TWO)))
    np.testing.assert_allclose(bars(ax), [(0.2, 0.6), (0.8, 1.2)])
    assert label_texts(ax) == ["one", "two"]
    assert [text.get_position()[0] for text in labels(ax)] == pytest.approx([0.4, 1.0])
    assert ax.get_xlim() == (0, 3)


def test_unlikely_words_are_red_and_likely_ones_blue():
    ax = plot_words(SAMPLES, ONE_TWO)
    [collection] = [c for c in ax.collections if c.get_label() == "words"]
    unlikely, likely = collection.get_facecolor()
    assert unlikely[0] > unlikely[2]
    assert likely[2] > likely[0]


def test_a_transcript_without_words_shows_its_segments():
    result = transcript(segment(" one two", 0.2, 1.2), segment("", 1.5, 1.5), segment(" six", 2.0, 2.5))
    ax = plot_words(SAMPLES, result)
    assert label_texts(ax) == ["one two", "six"]
    assert len(bars(ax)) == 2  # none for the empty segment


def test_the_probability_of_tokens_comes_from_their_log_probability():
    tokens = [{"id": 7, "text": " one", "logprob": np.log(0.75), "start": 0.2, "end": 0.6}]
    assert [bar.get_height() for bar in plot_probabilities(tokens).patches] == pytest.approx([0.75])


def test_a_word_without_time_is_not_drawn():
    assert label_texts(plot_words(SAMPLES, [*ONE_TWO, word("never", None, None)])) == ["one", "two"]


@pytest.mark.parametrize("bad", [{"text": ""}, ["one"], [{"start": 0, "end": 1}], 5])
def test_invalid_transcripts_are_rejected(bad: object):
    with pytest.raises(ValueError, match="is not a transcript; give one, or a list of its words"):
        plot_words(SAMPLES, bad)


def test_a_part_shows_overlapping_words_and_labels_those_centred_in_it():
    ax = plot_words(SAMPLES, [*ONE_TWO, word("three", 1.3, 2.9)], span_s=(0.5, 1.5))
    assert ax.get_xlim() == (0.5, 1.5)
    assert len(bars(ax)) == 3
    assert label_texts(ax) == ["two"]


@pytest.mark.parametrize("span_s", [(1, 1), (2, 1), (-1, 1)])
def test_empty_parts_are_rejected(span_s: tuple[float, float]):
    with pytest.raises(ValueError, match="start before end"):
        plot_words(SAMPLES, ONE_TWO, span_s=span_s)


@pytest.mark.parametrize("seed", range(3))
def test_labels_never_overlap_nor_leave_the_axes(seed: int):
    chosen = random.Random(seed)
    starts = [chosen.uniform(0, 2.9) for _ in range(60)]
    words = [word("o" * chosen.randint(1, 15), start, start + chosen.uniform(0, 0.3)) for start in starts]
    ax = plot_words(SAMPLES, words)
    ax.figure.draw_without_rendering()
    inside, boxes = ax.get_window_extent(), [text.get_window_extent() for text in labels(ax)]
    assert 10 < len(boxes) < 60  # some do not fit
    assert len(bars(ax)) == 60  # but all have a bar
    assert all(inside.x0 - 1 < box.x0 and box.x1 < inside.x1 + 1 for box in boxes)
    assert all(inside.y0 < box.y0 and box.y1 < inside.y1 + 1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_waveform_covers_the_samples():
    waveform = plot_words(SAMPLES, ONE_TWO, span_s=(1, 2)).collections[0].get_paths()[0].get_extents()
    assert waveform.intervalx == pytest.approx([1, 2], abs=0.01)
    assert waveform.intervaly == pytest.approx([-1, 1], abs=0.01)


@pytest.mark.parametrize("samples", [SAMPLES[:0], SAMPLES[:1], np.zeros(16_000, np.float32)])
def test_silence_and_single_samples_can_be_drawn(samples: np.ndarray):
    plot_words(samples, [], span_s=(0, 1)).figure.draw_without_rendering()


def test_the_rows_of_a_transcript_show_each_word_once():
    words = [word(f"w{i}", 0.1 * i, 0.1 * i + 0.1) for i in range(29)]
    *rows, colorbar = plot_transcript(SAMPLES, words, seconds_per_row=0.7).axes
    assert [ax.get_xlim() for ax in rows] == pytest.approx(np.array([(0.7 * i, 0.7 * i + 0.7) for i in range(5)]))
    assert [text for ax in rows for text in label_texts(ax)] == [w["word"].strip() for w in words]
    assert colorbar.get_xlabel() == "probability"


def test_the_mel_is_drawn_below_its_words_at_its_time():
    ax = plot_mel(np.zeros((80, 200)), [word("one", 10.2, 10.6)], start_s=10)
    assert tuple(ax.images[0].get_extent()) == (10, 12, 0, 80)
    assert label_texts(ax) == ["one"]
    assert labels(ax)[0].get_position()[1] > 80
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0.5 kHz", "1 kHz", "2 kHz", "4 kHz"]


def test_frequency_ticks_match_the_mel_filters():
    heights = plot_mel(np.zeros((80, 200))).get_yticks()
    hz = np.linspace(0, 8000, 201)
    strongest_hz = hz[features.mel_filters(80).argmax(axis=1)]
    np.testing.assert_allclose(strongest_hz[heights.astype(int)], [500, 1000, 2000, 4000], rtol=0.1)


def test_a_batch_of_mels_is_rejected():
    with pytest.raises(ValueError, match=r"\(1, 80, 200\), expected \[M,T\]"):
        plot_mel(np.zeros((1, 80, 200)))


def test_plots_are_drawn_into_given_axes():
    ax = Figure().add_subplot()
    assert plot_words(SAMPLES, ONE_TWO, ax) is ax
    assert plot_probabilities(ONE_TWO, ax) is ax


def test_bars_are_as_high_as_the_probabilities():
    ax = plot_probabilities([word("one", 0, 1, 0.25), word("two", 1, 2, 0.75)])
    assert [bar.get_height() for bar in ax.patches] == [0.25, 0.75]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["one", "two"]


def test_dollars_and_backslashes_are_literal():
    ax = plot_words(SAMPLES, [word(r"$\bad$", 0.5, 1.5)])
    ax.figure.draw_without_rendering()
    assert len(labels(ax)) == 1


def test_missing_characters_warn_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with pytest.warns(UserWarning, match="no installed font has '日語'") as warned:
        family = plotting._family(["日", "語", "one"])
    assert len(warned) == 1
    assert family == ["sans-serif"]


def test_a_font_with_the_characters_is_found(monkeypatch: pytest.MonkeyPatch):
    other = font_manager.FontEntry(fname="/other.ttf", name="Other")
    has = {"/other.ttf": frozenset(map(ord, "日語"))}
    monkeypatch.setattr(plotting, "_letters", lambda path: has.get(path, frozenset(map(ord, "one "))))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [other])
    assert plotting._family(["日 語"]) == ["sans-serif", "Other"]
    assert plotting._family(["one"]) == ["sans-serif"]


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model(alignment_heads=((1, 0), (1, 1)))


@pytest.fixture(scope="module")
def alignment(model: Whisper) -> Alignment:
    return align_window(model, SAMPLES, "one and the two", language="en")


def test_an_alignment_has_a_row_for_each_token_and_for_the_end(model: Whisper, alignment: Alignment):
    ids = model.tokenizer.encode(" one and the two")
    assert alignment.matrix.shape == (len(ids) + 1, model.config.max_source_positions)
    assert np.isfinite(alignment.matrix).all()
    assert len(alignment.begins_s) == len(alignment.labels) == len(ids) + 1
    assert len(alignment.probabilities) == len(ids)
    assert "".join(alignment.labels) == " one and the two(end)"


def test_the_path_is_continuous_from_the_first_cell_to_the_last(alignment: Alignment):
    rows, positions = alignment.path.T
    assert (rows[0], positions[0]) == (0, 0)
    assert (rows[-1] + 1, positions[-1] + 1) == alignment.matrix.shape
    assert set(np.diff(rows)) | set(np.diff(positions)) <= {0, 1}
    assert (np.diff(rows) + np.diff(positions) > 0).all()


def test_the_path_enters_each_row_where_the_token_starts(alignment: Alignment):
    rows, positions = alignment.path.T
    entered_s = [positions[rows == row].min() / 50 for row in range(len(alignment.labels))]
    np.testing.assert_allclose(entered_s, alignment.begins_s, atol=1e-6)


def test_a_later_window_aligns_that_part_of_the_recording(model: Whisper, alignment: Alignment):
    twice = np.tile(SAMPLES[:16_000], 2)  # the window is 1 s long
    later = align_window(model, np.append(twice, SAMPLES), "one and the two", language="en", start_s=1.0)
    assert later.begins_s[0] == 1.0
    np.testing.assert_array_equal(later.path[[0, -1]], alignment.path[[0, -1]])


def test_without_a_text_the_decoded_tokens_are_aligned(model: Whisper):
    window = RecordingMel(SAMPLES, model.config.num_mel_bins, 100).window(0, 100)
    decoded = decode(model, window, language="en", without_timestamps=True)
    assert len(decoded.tokens) > 3
    of_ids = align_window(model, SAMPLES, decoded.tokens, language="en")
    np.testing.assert_array_equal(align_window(model, SAMPLES, language="en").path, of_ids.path)


def test_token_ids_are_accepted_as_text(model: Whisper, alignment: Alignment):
    ids = model.tokenizer.encode(" one and the two")
    np.testing.assert_array_equal(align_window(model, SAMPLES, ids, language="en").path, alignment.path)


def test_other_heads_give_another_matrix(model: Whisper, alignment: Alignment):
    other = align_window(model, SAMPLES, "one and the two", language="en", alignment_heads=((0, 1),))
    assert not np.allclose(other.matrix, alignment.matrix)
    np.testing.assert_array_equal(other.probabilities, alignment.probabilities)


def test_a_window_after_the_audio_is_rejected(model: Whisper):
    with pytest.raises(ValueError, match=r"start_s=5 is not within the 3\.0 s"):
        align_window(model, SAMPLES, "one", start_s=5)


def test_a_character_of_several_tokens_is_labelled_once(model: Whisper):
    assert align_window(model, SAMPLES, "日", language="en").labels[-4:] == ("日", "…", "…", "(end)")


def test_the_drawn_path_equals_the_alignment(alignment: Alignment):
    ax = plot_alignment(alignment)
    [line] = ax.lines
    np.testing.assert_array_equal(line.get_ydata(), alignment.path[:, 0])
    np.testing.assert_allclose(line.get_xdata() * 50 - 0.5, alignment.path[:, 1])
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first token at the top
    drawn = [label.get_text() for label in ax.get_yticklabels()]
    assert drawn == [label.strip() for label in alignment.labels]


def test_labels_are_thinned_out_if_they_do_not_fit(alignment: Alignment):
    n = 100
    many = Alignment(np.eye(n), np.arange(n) / 50, tuple(map(str, range(n))), np.full(n - 1, 0.5))
    ax = plot_alignment(many, Figure(figsize=(4, 2)).add_subplot())
    shown = [label.get_text() for label in ax.get_yticklabels()]
    assert 5 < len(shown) < 20
    assert shown == [str(round(at)) for at in ax.get_yticks()]
    assert to_rgba(ax.get_yticklabels()[0].get_bbox_patch().get_facecolor())[3] == 0.5

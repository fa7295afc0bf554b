"""Error rates, word times, and reports of an evaluation: relations that hold for all texts, and examples by hand."""

import json
from html.parser import HTMLParser
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_nnx.evaluation.error_rates import Counts, ErrorRates, compare, error_rates
from whisper_nnx.evaluation.normalizers import normalize, split
from whisper_nnx.evaluation.page import to_html
from whisper_nnx.evaluation.results import Evaluation, RowResult, Scores
from whisper_nnx.evaluation.tables import to_table
from whisper_nnx.evaluation.times import TimedWord, TimeErrors, time_errors

TEXTS = st.text("ab c d, É一二", max_size=12)
LANGUAGES = st.sampled_from(["en", "de", "zh", None])


@given(TEXTS, TEXTS, LANGUAGES)
def test_counts_add_up_to_both_texts(reference: str, hypothesis: str, language: str | None) -> None:
    words = compare(reference, hypothesis, language)[0].words
    assert words.length == len(split(reference, language))
    assert words.hits + words.substitutions + words.insertions == len(split(hypothesis, language))


@given(TEXTS, TEXTS, LANGUAGES)
def test_pairs_are_both_texts_side_by_side(reference: str, hypothesis: str, language: str | None) -> None:
    rates, pairs = compare(reference, hypothesis, language)
    assert [pair.reference for pair in pairs if pair.reference] == split(reference, language)
    assert [pair.hypothesis for pair in pairs if pair.hypothesis] == split(hypothesis, language)
    assert sum(pair.kind != "equal" for pair in pairs) == rates.words.errors
    assert all((pair.kind == "equal") == (pair.reference == pair.hypothesis) for pair in pairs)


@given(st.lists(st.tuples(TEXTS, TEXTS, LANGUAGES), max_size=4))
@settings(max_examples=50)
def test_rates_of_several_texts_are_the_sum_of_those_of_each(rows: list[tuple[str, str, str | None]]) -> None:
    references, hypotheses, languages = ([row[i] for row in rows] for i in range(3))
    each = [error_rates([reference], [hypothesis], language) for reference, hypothesis, language in rows]
    assert error_rates(references, hypotheses, languages) == sum(each, ErrorRates())


def test_rates_are_those_of_jiwer_over_the_whole_corpus() -> None:
    references, hypotheses = ["eins zwei drei", "vier"], ["eins zwo drei drei", "fünf"]
    rates = error_rates(references, hypotheses, "de")
    assert rates.wer == jiwer.wer(references, hypotheses) == 3 / 4
    assert rates.cer == jiwer.cer(references, hypotheses)
    assert rates.words == Counts(hits=2, substitutions=2, deletions=0, insertions=1)


@pytest.mark.parametrize(
    ("one", "other", "language"),
    [
        ("Mr. Grey won't pay twenty-one dollars.", "mister gray will not pay $21", "en"),
        ("Um, that's the colour [laughs]", "that is the color", "en"),
        ("Ja -- genau!", "ja genau (lacht)", "de"),
        ("你好，世界。", "你好 世界", "zh"),
    ],
)
def test_ways_to_write_the_same_are_no_errors(one: str, other: str, language: str) -> None:
    assert error_rates([one], [other], language).words.errors == 0
    assert error_rates([one], [other], language, "none").words.errors > 0


def test_only_english_is_written_the_american_way() -> None:
    assert normalize("The colour", "en") == "the color"
    assert normalize("The colour", "de") == "the colour" == normalize("The colour", "en", "basic")
    assert normalize("The colour", "de", "english") == "the color"
    assert normalize(" The \n colour ", "en", "none") == "The colour"


def test_words_that_only_the_package_expands_are_left_as_they_are() -> None:
    assert normalize("the cause, I dunno, is kinda sorta gone", "en") == "the cause i dunno is kinda sorta gone"


def test_text_where_nobody_speaks_is_inserted_and_counts_in_the_whole() -> None:
    silent = error_rates([""], ["thank you"], "en")
    assert (silent.words, silent.wer) == (Counts(insertions=2), None)
    assert error_rates(["", "one two three four"], ["thank you", "1 2 3 4"], "de").wer == 6 / 4
    assert error_rates([""], [""], "en") == ErrorRates()


@pytest.mark.parametrize("language", ["zh", "ja", "th", "lo", "my", "yue"])
def test_without_spaces_words_are_letters(language: str) -> None:
    rates = error_rates(["一二三 四"], ["一三四五"], language)
    assert rates.words == rates.characters == Counts(hits=3, deletions=1, insertions=1)


def test_lists_that_do_not_match_and_unknown_normalizers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 references, 1 hypotheses and 2 languages .*; give one of each"):
        error_rates(["a", "b"], ["a"], "en")
    with pytest.raises(ValueError, match=r"normalizer='french' is unknown; choose auto, english, basic, none"):
        error_rates(["a"], ["a"], "fr", "french")


def timed(text: str, shift_s: float = 0.0) -> list[TimedWord]:
    """A word each half second, that lasts 0.3 s."""
    return [TimedWord(word, 0.5 * i + shift_s, 0.5 * i + 0.3 + shift_s) for i, word in enumerate(text.split("|"))]


def test_a_transcript_that_is_late_is_late_at_every_boundary() -> None:
    errors = time_errors(timed("Six|zero|nine"), timed(" six| Zero,| nine.", 0.125), "en")
    assert errors.starts == errors.ends == pytest.approx([0.125] * 3)
    assert errors.words == 3


def test_words_that_were_not_recognized_have_no_time_error() -> None:
    errors = time_errors(timed("one|two|three"), timed("one|too|much|three"), "de")
    assert (errors.words, errors.starts) == (3, pytest.approx([0.0, 0.5]))


def test_words_are_matched_as_they_are_normalized_each_alone() -> None:
    errors = time_errors(timed("don't|twenty|-|one"), timed("do not|20|1"), "en")
    assert (errors.words, errors.starts) == (3, pytest.approx([0.0, 0.0, -0.5]))


def test_without_spaces_times_are_compared_where_both_have_a_boundary() -> None:
    truth = [TimedWord("你好", 0.0, 1.0), TimedWord("世界", 1.0, 2.0)]
    found = [TimedWord("你", 0.25, 0.5), TimedWord("好", 0.5, 0.75), TimedWord("世界", 1.5, 2.5)]
    assert time_errors(truth, found, "zh") == TimeErrors((0.25, 0.5), (-0.25, 0.5), 2)


def test_spread_is_of_absolute_errors_of_all_that_was_added() -> None:
    errors = TimeErrors((0.1, -0.3), (0.0,), 2) + TimeErrors((-0.2,), (), 1)
    assert errors.words == 3
    expected = {"median": 0.2, "mean": 0.2, "p90": np.percentile([0.1, 0.2, 0.3], 90)}
    assert errors.spread("starts") == pytest.approx(expected)
    assert TimeErrors(words=2).spread("ends") is None


def row(name: str, reference: str, hypothesis: str, language: str | None = "de", **more: Any) -> RowResult:
    rates, pairs = compare(reference, hypothesis, language, "none")
    scores = Scores(1, 2.0, rates, **more)
    return RowResult(name, language, "transcribe", "", reference, hypothesis, language, pairs, scores)


ROWS = (
    row("good.wav", "eins zwei", "eins zwei", guessed=1, guessed_right=1),
    row("bad.wav", "drei <b>&amp; vier", 'funf <script>alert("x")</script> & mehr', "fr", guessed=1),
    row("silence.wav", "", "danke", None, silent=1, invented=1),
    RowResult("<broken>.wav", "de", "transcribe", "", "acht", error="holds <no> sound"),
)
EVALUATION = Evaluation(ROWS, wall_s=4.0, compile_s=1.0, about={"model": "<tiny>"})


def test_the_worst_come_first_and_the_faultless_are_not_among_them() -> None:
    assert [result.name for result in EVALUATION.worst()] == ["silence.wav", "bad.wav"]
    assert [result.name for result in EVALUATION.ranked()] == ["silence.wav", "bad.wav", "good.wav"]


def test_groups_add_up_to_the_whole_and_failures_count_nowhere() -> None:
    groups = EVALUATION.by_language()
    assert list(groups) == ["(none)", "de", "fr"]
    assert sum(groups.values(), Scores()) == EVALUATION.total
    assert (EVALUATION.total.recordings, len(EVALUATION.failed)) == (3, 1)


def test_speed_leaves_compilation_apart() -> None:
    assert EVALUATION.speed == pytest.approx(6.0 / 3.0)


def test_json_has_every_row_and_no_number_that_json_lacks() -> None:
    report = json.loads(json.dumps(EVALUATION.to_dict(), allow_nan=False))
    assert [entry["name"] for entry in report["rows"]] == [result.name for result in ROWS]
    assert report["summary"]["wer"] == EVALUATION.wer
    assert report["summary"]["language"] == {"guessed": 2, "right": 1}
    assert report["rows"][2]["wer"] is None
    assert report["rows"][3]["error"] == "holds <no> sound"
    assert report["by_language"]["fr"]["insertions"] == ROWS[1].scores.rates.words.insertions


def test_columns_of_tables_are_aligned_even_under_wide_letters() -> None:
    rows = (*ROWS[:2], row("你好.wav", "一二", "一三", "zh"))
    table = to_table(Evaluation(rows, 1.0)).split("\n\n")[1].splitlines()
    assert table[0].startswith("file, worst first") and set(table[1]) == {"-"}  # noqa: PT018
    widths = {len(line) + (2 if "你好" in line else 0) for line in table}
    assert len(widths) == 1


def test_of_many_files_only_the_worst_are_printed() -> None:
    table = to_table(EVALUATION, n_worst=1)
    assert "the worst 1 of 3 files" in table
    assert "silence.wav" in table
    assert "bad.wav" not in table


class Page(HTMLParser):
    """Tags that are open when the page ends, all that were seen, and what stands in spans of a class."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))


def test_the_page_is_whole_needs_nothing_else_and_escapes_all_texts() -> None:
    page = Page(to_html(EVALUATION))
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "broken", "no", "tiny"}
    assert not any(name in ("src", "href") for _, attributes in page.tags for name in attributes)
    texts = {text for _, text in page.texts}
    assert {"<broken>.wav: holds <no> sound", "<tiny>", "good.wav", "<b>&amp;"} <= texts
    assert '<script>alert("x")</script>' in texts


def test_the_page_shows_each_kind_of_error_in_its_colour() -> None:
    result = row("a.wav", "eins zwei drei vier sechs", "eins zwo vier sechs fünf")
    page = to_html(Evaluation((result,), 1.0))
    assert '<span class="pair"><span>eins</span></span>' in page
    assert '<span class="pair substitute"><s>zwei</s><span>zwo</span></span>' in page
    assert '<span class="pair delete"><s>drei</s><span></span></span>' in page
    assert '<span class="pair insert"><span></span><span>fünf</span></span>' in page

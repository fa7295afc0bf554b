"""The recipe of the demo model, as far as it goes without the synthesizers' libraries."""

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.training.config_file import load_config

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_demo"))

import make_data
import make_tokenizer
import sentences
import speech

RECIPE = Path(speech.__file__).parent


def drawn(language: str, n: int, seed: int = 0) -> list[sentences.Sentence]:
    rng = random.Random(seed)
    return [sentences.sentence(language, rng) for _ in range(n)]


def test_each_stage_begins_with_the_model_of_the_one_before():
    names = ("clips", "passages", "windows", "polish", "context", "finish", "pauses")
    stages = [load_config(RECIPE / f"{name}.toml") for name in names]
    assert len(stages) == len(list(RECIPE.glob("*.toml")))
    assert [stage.model.init for stage in stages] == ["", *(f"{stage.output}/export" for stage in stages[:-1])]
    text = (RECIPE / "README.md").read_text("utf-8")
    commands = [text.index(f"--config examples/train_demo/{Path(stage.output).name[5:]}.toml") for stage in stages]
    assert commands == sorted(commands)
    assert f"--model {stages[-1].output}/export" in text


@pytest.mark.parametrize("language", sentences.LANGUAGES)
def test_sentences_are_those_of_their_seed_and_written_as_a_reader_would(language):
    some = drawn(language, 300)
    assert some == drawn(language, 300)
    assert some != drawn(language, 300, seed=1)
    for each in some:
        assert "{" not in each.text
        assert each.text[-1] in ".?"
        assert next(letter for letter in each.text if letter.isalpha()).isupper()


def test_only_numbers_in_other_languages_are_translated():
    assert not any(each.english for each in drawn("en", 300))
    german = {each.text: each.english for each in drawn("de", 3000)}
    assert german["Drei."] == "Three."
    assert german["Guten Morgen, wie geht es dir?"] is None
    assert sum(map(bool, german.values())) > 0.3 * len(german)


def test_words_that_are_spoken_in_one_breath_share_its_time_by_their_letters():
    words = speech._words("One of it. Two", {0: 0.0, 4: 0.4, 11: 1.5}, [1.2, 2.0], 2.5)
    assert [word for word, _, _ in words] == ["One", "of", "it.", "Two"]
    assert np.allclose([[a, b] for _, a, b in words], [[0, 0.4], [0.4, 0.72], [0.72, 1.2], [1.5, 2.0]])


def test_words_of_flite_are_joined_to_those_of_the_text():
    spoken = [("it", 0.0, 0.1), ("'s", 0.1, 0.2), ("half", 0.2, 0.5), ("past", 0.5, 0.8)]
    assert speech._match("It's half past.", spoken) == [("It's", 0.0, 0.2), ("half", 0.2, 0.5), ("past.", 0.5, 0.8)]
    with pytest.raises(ValueError, match=r"flite speaks 'half' for 'past\.'"):
        speech._match("past.", spoken[2:])


def test_rows_of_digits_have_the_words_and_times_of_their_clips(tmp_path):
    rng = np.random.default_rng(0)
    clips = {(digit, "ann", n): rng.normal(0, 0.1, 4000).astype(np.float32) for digit in range(10) for n in range(3)}
    rows = make_data.short_rows(tmp_path / "none", "digits", "en", clips, 0, 0)
    assert rows == []
    (tmp_path / "audio").mkdir()
    for row in make_data.short_rows(tmp_path, "digits", "en", clips, 0, 20):
        assert (tmp_path / row["audio"]).is_file()
        assert row["text"].split() == [word["word"] for word in row["words"]]
        assert row["words"][-1]["end"] == pytest.approx(row["duration"], abs=2e-3)
        for word in row["words"]:
            assert word["end"] - word["start"] == pytest.approx(0.25, abs=2e-3)


def test_the_vocabulary_is_small_and_its_special_tokens_are_in_whispers_order(tmp_path, digits):
    texts = [each.text for language in sentences.LANGUAGES for each in drawn(language, 2000)]
    (tmp_path / "sentences.txt").write_text("\n".join(texts), encoding="utf-8")
    make_tokenizer.main(str(tmp_path / "sentences.txt"), str(tmp_path / "tokenizer"))
    small, released = Tokenizer.from_folder(tmp_path / "tokenizer"), Tokenizer.from_folder(digits)
    assert small.special.eot == make_tokenizer.TEXT_TOKENS
    shift = released.special.eot - small.special.eot
    for name in ("sot", "translate", "transcribe", "sot_lm", "sot_prev", "no_speech", "no_timestamps"):
        assert getattr(small.special, name) == getattr(released.special, name) - shift
    assert small.special.languages == tuple((code, i - shift) for code, i in released.special.languages)
    assert small.special.timestamp_begin == released.special.timestamp_begin - shift
    assert small.vocab_size == released.vocab_size - shift
    for text, count in Counter(texts).items():
        assert small.decode(small.encode(" " + text)) == " " + text, count

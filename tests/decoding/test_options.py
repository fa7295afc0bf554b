"""`DecodingOptions`: what it takes, and what it refuses with the value and the way out."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from whisper_nnx.decoding.options import DecodingOptions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sing"}, "'sing'.*transcribe, translate"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"sample_len": 0}, "sample_len=0"),
        ({"sample_len": -3}, "sample_len=-3"),
        ({"sample_len": 2.5}, "sample_len=2.5"),
        ({"sample_len": "many"}, "sample_len='many'"),
        ({"sample_len": float("inf")}, "sample_len=inf"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"beam_size": True}, "beam_size=True"),
        ({"best_of": 0, "temperature": 0.5}, "best_of=0"),
        ({"best_of": 5}, "best_of=5.*temperature"),
        ({"best_of": 5, "beam_size": 3}, "beam_size=3 and best_of=5"),
        ({"beam_size": 3, "temperature": 0.2}, "beam_size=3.*0.2"),
        ({"patience": 2.0}, "patience=2.0.*beam_size"),
        ({"beam_size": 2, "patience": 0.1}, "patience=0.1.*beam_size=2"),
        ({"beam_size": 2, "patience": -1.0}, "patience=-1.0"),
        ({"length_penalty": 1.5}, "length_penalty=1.5"),
        ({"length_penalty": -0.5}, "length_penalty=-0.5"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"suppress_tokens": "a,b"}, "'a,b'"),
        ({"suppress_tokens": "1;2"}, "'1;2'"),
        ({"max_initial_timestamp": -1.0}, "max_initial_timestamp=-1.0"),
        ({"max_initial_timestamp": float("nan")}, "max_initial_timestamp=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 5, "sample_len": 6}, "sample_len=6 and max_new_tokens=5.*drop one"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size=-1"),
        ({"no_repeat_ngram_size": None}, "no_repeat_ngram_size=None"),
        ({"suppress_regex": "(a"}, r"suppress_regex='\(a'.*not a valid"),
        ({"suppress_regex": "\n["}, "suppress_regex="),
        ({"suppress_regex": 7}, "suppress_regex=7"),
        ({"max_repeats": 1}, "max_repeats=1 .*at least 2"),
        ({"lm": "words.arpa"}, "lm='words.arpa' is not a file; give an ARPA file"),
        ({"lm": 3}, "lm=3 must be an ARPA file, or a function in JAX"),
        ({"lm_weight": -1.0}, "lm_weight=-1.0"),
        ({"bias_weight": 0.0}, "bias_weight=0.0"),
        ({"bias": 5}, "bias=5 must be a list of phrases"),
        ({"bias": [5]}, r"bias has 5; give a phrase, or a tuple \(phrase, weight, variants\)"),
        ({"bias": [("one", -1)]}, "bias has the weight -1 for 'one'; give a number above 0"),
        ({"bias": "one\tmuch"}, "the weight 'much' for 'one'"),
        ({"bias": ["\n"]}, r"bias has '\\n'; .*1 to 200 letters"),
        ({"bias": [{"word": "one"}]}, "bias has {'word': 'one'}; give a phrase"),
        ({"bias": [("one", 1, ["won"] * 21)]}, "bias has 21 variants of 'one'; give at most 20"),
        ({"bias": ["one"] * 5001}, "bias has 5001 phrases; give at most 5000"),
        ({"n_best": 0}, "n_best=0"),
        ({"n_best": 2}, "n_best=2 needs beam_size or best_of of at least 2"),
        ({"n_best": 4, "beam_size": 3}, "n_best=4.*3"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_with_its_value(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        DecodingOptions(**changes)
    assert "\n" not in str(error.value)


def test_options_are_frozen_and_hashable_whatever_they_were_given():
    ids = [1, 2]
    options = DecodingOptions(prompt=ids, prefix=np.array(ids), suppress_tokens=ids)
    assert (options.prompt, options.prefix, options.suppress_tokens) == ((1, 2),) * 3
    assert hash(options) == hash(replace(options))
    assert ids == [1, 2]
    with pytest.raises(FrozenInstanceError):
        options.temperature = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    "given",
    [
        " one , two words",
        "one\ntwo words\n",
        ["one", "two words"],
        "one\t\n\ntwo words\t\t",
        [{"text": "one"}, ("two words", None, ())],
    ],
    ids=repr,
)
def test_phrases_to_prefer_may_be_text_or_a_list(given):
    assert DecodingOptions(bias=given).bias == (("one", None, ()), ("two words", None, ()))
    weighted = DecodingOptions(bias="one\t2\twon\t wan")
    assert weighted.bias == (("one", 2.0, ("won", "wan")),)
    assert DecodingOptions(bias=[("one", 2, ["won", "wan"])]) == weighted
    assert DecodingOptions(bias=[]).bias is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [("-1", (-1,)), ("1,2", (1, 2)), (" 1, 2 ,", (1, 2)), ("", ()), (None, ()), ((), ()), ([3], (3,)), ({4}, (4,))],
)
def test_tokens_to_suppress_may_be_text_a_list_or_nothing(given, meant):
    assert DecodingOptions(suppress_tokens=given).suppress_tokens == meant


@pytest.mark.parametrize(("patience", "expected"), [(None, 5), (1.0, 5), (2.0, 10), (0.5, 2), (1.5, 8)])
def test_patience_multiplies_how_many_sequences_must_end(patience, expected):
    """Halves go to the even number, as in the reference."""
    assert DecodingOptions(beam_size=5, patience=patience).max_candidates == expected


def test_a_whole_number_may_come_as_a_float():
    options = DecodingOptions(beam_size=3.0, sample_len=5.0)
    assert (options.beam_size, options.sample_len) == (3, 5)
    assert isinstance(options.beam_size, int)
    assert isinstance(options.sample_len, int)

"""No row chooses among forbidden tokens only: that is refused, or the row ends."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_config, small_mel, small_model, small_tokenizer_files  # noqa: F401
from whisper_nnx import decode, transcribe
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.windows import DecodingOptions, decode_windows, encode_windows

SOUND = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
NEVER_SILENT = {"no_speech_threshold": None, "logprob_threshold": None, "compression_ratio_threshold": None}


@pytest.fixture(scope="module")
def model():
    return small_model()


def old_files(*added: str) -> dict[str, bytes]:
    """Of a tokenizer that lists no timestamps, to which a fine-tune added tokens: they get the timestamps' ids."""
    files = small_tokenizer_files()
    names = json.loads(files["added_tokens.json"])
    names = [name for name in names if not name[2:3].isdigit()] + list(added)
    first = len(json.loads(files["vocab.json"]))
    return {**files, "added_tokens.json": json.dumps({name: i for i, name in enumerate(names, first)}).encode()}


def test_added_tokens_in_the_place_of_timestamps_are_refused():
    with pytest.raises(ValueError, match=r"list no timestamps, and 'hello' has the id of <\|0.00\|>"):
        Tokenizer.from_files(old_files("hello", "world"), small_config().vocab_size)
    tokenizer = Tokenizer.from_files(old_files(), small_config().vocab_size)
    assert tokenizer.special.timestamp_end > tokenizer.special.timestamp_begin


def test_a_vocabulary_without_timestamps_decodes_without_them():
    begin = Tokenizer.from_files(old_files()).special.timestamp_begin
    tokenizer = Tokenizer.from_files(old_files(), begin)
    model = small_model(tokenizer=tokenizer, vocab_size=begin)
    with pytest.raises(ValueError, match="no timestamps; set without_timestamps=True"):
        transcribe(model, SOUND, language="en")
    assert transcribe(model, SOUND, language="en", without_timestamps=True, **NEVER_SILENT)["segments"]


def test_suppressed_tokens_must_leave_something_to_begin_with(model):
    special = model.tokenizer.special
    times = list(range(special.timestamp_begin, special.timestamp_end + 1))
    for options in ({"suppress_tokens": times}, {"suppress_tokens": times[:1], "max_initial_timestamp": 0.0}):
        with pytest.raises(ValueError, match=r"no timestamp that a window could start with; .*without_timestamps=True"):
            transcribe(model, SOUND, language="en", **options)
        with pytest.raises(ValueError, match="no timestamp"):
            decode(model, small_mel(1)[0], language="en", **options)
    others = [i for i in range(model.config.vocab_size) if i != special.eot]
    with pytest.raises(ValueError, match="no token that a window could start with"):
        transcribe(model, SOUND, language="en", without_timestamps=True, suppress_tokens=others)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "best_of": 2}, {"beam_size": 3}], ids=str)
def test_a_row_that_may_choose_nothing_ends(model, how):
    """After the first timestamp neither text nor the end may come, so that there is nothing left."""
    begin = model.tokenizer.special.timestamp_begin
    others = [i for i in range(model.config.vocab_size) if i != begin]
    rows = [DecodingOptions(language="en", suppress_tokens=others, **how)] * 2
    encoded = encode_windows(model, jnp.asarray(small_mel(2)))
    for result in decode_windows(model, encoded, rows, [1, 2]):
        assert result.tokens == (begin,)
        assert result.avg_logprob == 0  # each was the only choice


@pytest.mark.parametrize("options", [{}, {"word_timestamps": True, "alignment_heads": ((1, 0),)}, {"batch_size": 2}])
def test_an_empty_array_is_an_empty_transcript(model, options):
    with pytest.warns(UserWarning, match="the array is empty"):
        result, _ = transcribe(model, [np.zeros(0, np.float32)] * 2, **options)
    assert (result["text"], result["segments"]) == ("", [])
    assert result["language"] in model.tokenizer.languages

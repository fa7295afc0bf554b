"""`transcribe` with a draft: the same transcript, from the same options."""

import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation, small_model, small_tokenizer  # noqa: F401
from whisper_nnx import transcribe, warmup
from whisper_nnx.transcription import windows
from whisper_nnx.transcription.drafts import DraftModel, with_draft
from whisper_nnx.transcription.options import NGRAM

RANDOM = np.random.default_rng(1)
NOISES = [RANDOM.normal(0, 0.1, int(seconds * 16_000)).astype(np.float32) for seconds in (2.5, 0.7, 3.2)]
OPTIONS = {"language": "en", "temperature": (0.0, 0.5), "word_timestamps": True, "alignment_heads": [(0, 0)]}


@pytest.fixture(scope="module")
def model():
    return small_model(end_bias=3.0)


@pytest.fixture(scope="module")
def plain(model):
    return transcribe(model, NOISES, **OPTIONS)


def draft_named(name: str, model):
    if name == NGRAM:
        return NGRAM
    draft = small_model(seed=2, decoder_layers=1)
    if name == "same encoder":
        draft.encoder = nnx.clone(model.encoder)
    return draft


@pytest.mark.parametrize("draft", [NGRAM, "same encoder", "other encoder"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_draft_changes_no_transcript(model, plain, draft, batch_size, monkeypatch):
    calls, generate = [], windows.generate_speculative

    def counting(*arguments):
        calls.append(len(arguments[2].limit))
        return generate(*arguments)

    monkeypatch.setattr(windows, "generate_speculative", counting)
    drafted = transcribe(model, NOISES, **OPTIONS, draft=draft_named(draft, model), batch_size=batch_size)
    assert len(calls) >= len(NOISES)
    for ours, theirs in zip(drafted, plain, strict=True):
        assert ours["text"] == theirs["text"]
        for mine, other in zip(ours["segments"], theirs["segments"], strict=True):
            same = ("tokens", "start", "end", "temperature", "words")
            assert {name: mine[name] for name in same[:4]} == {name: other[name] for name in same[:4]}
            assert [word["start"] for word in mine["words"]] == [word["start"] for word in other["words"]]
            np.testing.assert_allclose(mine["avg_logprob"], other["avg_logprob"], atol=1e-4)
    assert any(segment["temperature"] == 0 for result in plain for segment in result["segments"])


def test_a_draft_with_the_same_encoder_uses_the_models_output(model):
    same = with_draft(model, draft_named("same encoder", model)).draft
    other = with_draft(model, draft_named("other encoder", model)).draft
    assert isinstance(same, DraftModel)
    assert same.encoder is None
    assert other.encoder is not None


def test_nothing_is_compiled_after_warmup(model, compilations):
    warmup(model, batch_sizes=(1, 2), draft=NGRAM, **OPTIONS)
    assert compilations
    compilations.clear()
    transcribe(model, NOISES[0], draft=NGRAM, **OPTIONS)
    transcribe(model, NOISES, draft=NGRAM, batch_size=2, **OPTIONS)
    assert compilations == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": NGRAM, "beam_size": 2}, "beam_size=2: a draft needs greedy decoding"),
        ({"draft": NGRAM, "temperature": 0.4}, "temperature=.*: a draft needs greedy decoding"),
        ({"draft": "tiny"}, "draft='tiny' must be a model"),
        ({"draft": small_model(vocab_size=400)}, "another vocabulary"),
    ],
    ids=["beams", "samples", "name", "vocabulary"],
)
def test_a_draft_that_could_not_be_used_is_refused(model, options, message):
    for audio in (NOISES[0], NOISES):
        with pytest.raises(ValueError, match=message):
            transcribe(model, audio, **options)

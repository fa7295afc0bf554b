"""Drafts with OpenAI's checkpoints, in float32: the tokens of greedy decoding without one, on all shared recordings."""

import numpy as np
import pytest

from whisper_nnx import load_audio, load_model, transcribe
from whisper_nnx.training.config import DistillConfig
from whisper_nnx.training.distill import make_student
from whisper_nnx.transcription.options import NGRAM

SOUNDS = {".flac", ".mp3", ".opus", ".wav"}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*digital silence")
@pytest.mark.parametrize("checkpoint", ["tiny.en", "base"])
def test_a_draft_changes_no_token_of_any_shared_recording(real_models, shared, checkpoint):
    """With n-grams, and with the first and last decoder layer as a draft model, untrained, which is often wrong."""
    model = load_model(real_models / checkpoint, dtype="float32")
    drafts = [NGRAM, make_student(model, DistillConfig(decoder_layers=2))]
    files = sorted(f for folder in ("audio", "real/audio") for f in (shared / folder).iterdir() if f.suffix in SOUNDS)
    count, different = 0, []
    for file in files:
        audio = load_audio(str(file))
        plain, *drafted = (tokens_of(model, audio, draft) for draft in (None, *drafts))
        count += len(plain)
        different += [(file.name, n) for n, tokens in enumerate(drafted) if tokens != plain]
    print(f"\n{checkpoint}: {len(files)} recordings, {count} tokens, {len(drafts)} drafts")
    assert different == []
    assert len(files) > 20
    assert count > 500


def tokens_of(model, audio: np.ndarray, draft) -> list[int]:
    found = transcribe(model, audio, temperature=0.0, draft=draft)
    return [token for segment in found["segments"] for token in segment["tokens"]]

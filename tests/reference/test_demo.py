"""The model in the package, loaded by transformers: the same transcripts, tokens and all, in float32."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import whisper_nnx
from tests.small import quick_compilation  # noqa: F401
from weight_loader import load_model
from whisper_nnx import decode, log_mel_spectrogram, pad_or_trim
from whisper_nnx.audio.loading import load_audio

FOLDER = Path(whisper_nnx.__file__).parent / "assets" / "demo"
AUDIO = Path(__file__).parents[2] / "examples" / "audio"
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.fixture(scope="module")
def theirs():
    model, info = transformers.WhisperForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    return model.eval(), transformers.WhisperProcessor.from_pretrained(FOLDER)


@pytest.mark.slow
@pytest.mark.parametrize("timestamps", [False, True])
@pytest.mark.parametrize("language", ["en", "de", "es", "fr"])
def test_transformers_writes_the_same(theirs, language, timestamps):
    model, processor = theirs
    mel = np.asarray(log_mel_spectrogram(pad_or_trim(load_audio(AUDIO / f"{language}.flac")), 80))
    generated = model.generate(
        torch.from_numpy(mel[None]), language=language, task="transcribe", return_timestamps=timestamps
    )
    ours = decode(load_model(FOLDER), mel, language=language, without_timestamps=not timestamps)
    assert ours.text.strip() == processor.batch_decode(generated, skip_special_tokens=True)[0].strip()
    kept = [token for token in generated[0].tolist() if token < model.config.vocab_size]
    assert [token for token in ours.tokens if token < 1000] == [token for token in kept if token < 1000]

"""Alignment heads are openai-whisper's, likelihoods transformers'."""

import base64
import gzip

import numpy as np
import pytest

from whisper_nnx import log_mel_spectrogram, pad_or_trim
from whisper_nnx.alignment.likelihood import score
from whisper_nnx.model.config import ALIASES, RELEASED, RELEASED_ALIGNMENT_HEADS


def test_the_alignment_heads_of_all_released_sizes_are_those_of_openai_whisper():
    import whisper

    for name, encoded in whisper._ALIGNMENT_HEADS.items():
        known = ALIASES.get(name, name)
        config = RELEASED[known]
        mask = np.frombuffer(gzip.decompress(base64.b85decode(encoded)), bool)
        pairs = np.argwhere(mask.reshape(config.decoder_layers, config.decoder_attention_heads))
        assert RELEASED_ALIGNMENT_HEADS[known] == tuple(map(tuple, pairs.tolist()))
    assert {ALIASES.get(name, name) for name in whisper._ALIGNMENT_HEADS} == RELEASED.keys()


def test_a_texts_likelihood_is_the_teacher_forced_loss_of_transformers(model, digits, recordings):
    import torch
    from transformers import WhisperForConditionalGeneration

    peer = WhisperForConditionalGeneration.from_pretrained(str(digits)).float().eval()
    texts = ["Six zero nine.", "two two", "Please call me tomorrow morning."]
    audio = recordings["en_short_3s"]
    mel = torch.tensor(np.asarray(log_mel_spectrogram(pad_or_trim(audio))))[None]
    start = model.tokenizer.sot_sequence("en", "transcribe", timestamps=False)
    for scored in score(model, audio, texts, language="en"):
        ids = torch.tensor([[*start, *scored.tokens, model.tokenizer.special.eot]])
        labels = ids.clone()
        labels[:, : len(start)] = -100
        with torch.no_grad():
            loss = peer(mel, decoder_input_ids=ids[:, :-1], labels=labels[:, 1:]).loss.item()
        assert scored.avg_logprob == pytest.approx(-loss, abs=1e-3)

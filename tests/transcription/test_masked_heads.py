"""`masked_heads`: a model without the heads that invent text."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from whisper_nnx import load_model, transcribe, with_masked_heads


def test_the_output_of_a_head_is_left_out_and_the_model_stays_as_it_is():
    model = small_model()
    layer = model.decoder.layers[1].self_attn
    before = np.array(layer.out_proj.kernel[...])
    masked = with_masked_heads(model, [(1, 0)])
    own, width = masked.decoder.layers[1].self_attn, before.shape[0] // layer.heads
    np.testing.assert_array_equal(layer.out_proj.kernel[...], before)
    np.testing.assert_array_equal(own.out_proj.kernel[...][:width], 0)
    np.testing.assert_array_equal(own.out_proj.kernel[...][width:], before[width:])
    assert masked.encoder.conv1.kernel is model.encoder.conv1.kernel  # shared
    mel, ids = small_mel(1), jnp.arange(4)[None]
    assert not np.allclose(model(mel, ids), masked(mel, ids))
    np.testing.assert_array_equal(with_masked_heads(masked, "1:0")(mel, ids), masked(mel, ids))
    assert with_masked_heads(model, None) is model


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        ([(9, 0)], r"head \(9, 0\) does not exist"),
        ("measured", "'measured' cannot be read"),
        ("3", "masked_heads='3' must be layer:head pairs"),
        ("a:b", "'a:b' cannot be read"),
    ],
)
def test_heads_that_cannot_be_masked_are_refused(heads, reason):
    with pytest.raises(ValueError, match=reason):
        with_masked_heads(small_model(), heads)


@pytest.mark.real
def test_speech_is_transcribed_without_these_heads(real_tiny_en, real_speech):
    model, path = load_model(real_tiny_en), real_speech("en_libri_5s.flac")
    masked = transcribe(model, path, masked_heads="3:2", temperature=0.0)["text"]
    assert "confused complaint" in masked

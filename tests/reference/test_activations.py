"""Hidden states and attention weights are those of transformers, layer by layer, in float32.

Tolerances as in test_weight_loader.py: sums in another order.
"""

import jax
import numpy as np
import pytest
import torch

from tests.reference.test_weight_loader import random_transformers_model
from tests.small import quick_compilation  # noqa: F401
from weight_loader import load_model

SHAPE = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 100,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 16,
}
IDS = np.array([[3, 14, 15, 92, 65], [35, 89, 79, 32, 38]])
REQUESTED = {"output_attentions": True, "output_hidden_states": True}


@pytest.mark.filterwarnings("ignore:.*no tokenizer:")
def test_activations_are_those_of_transformers(tmp_path):
    theirs = random_transformers_model(attn_implementation="eager", **SHAPE).eval()
    theirs.save_pretrained(tmp_path)
    mel = np.random.default_rng(0).standard_normal((2, 8, 40), dtype=np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(mel), decoder_input_ids=torch.tensor(IDS), **REQUESTED)

    model = load_model(tmp_path)
    found = jax.jit(lambda model, mel, ids: model(mel, ids, **REQUESTED))(model, mel, IDS)
    assert set(found._fields) <= set(expected.keys())
    for name, ours in found._asdict().items():
        whole = expected[name]
        pairs = zip(ours, whole, strict=True) if isinstance(whole, tuple) else [(ours, whole)]
        for x, y in pairs:
            np.testing.assert_allclose(x, y.numpy(), atol=1e-3 if name == "logits" else 2e-4, err_msg=name)

    encoded = jax.jit(lambda model, mel: model.encode(mel, output_hidden_states=True))(model, mel)
    assert encoded.attentions is None
    np.testing.assert_allclose(encoded.hidden_states[-1], encoded.last_hidden_state)
    decode = jax.jit(lambda model, ids, encoded: model.decode(ids, encoded, output_attentions=True))
    decoded = decode(model, IDS, encoded.last_hidden_state)
    assert decoded.decoder_hidden_states is None
    for x, y in zip(decoded.cross_attentions, found.cross_attentions, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)

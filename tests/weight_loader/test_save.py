"""Models that no format can represent are rejected by name before anything is written."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from weight_loader import CheckpointError, load_model, save_model, save_pretrained
from weight_loader.writers import WRITERS
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.training.config import LoraConfig
from whisper_nnx.training.lora import add_lora, merge


def model(**changes) -> Whisper:
    return small_model(**{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **changes})


def with_flax_lora() -> Whisper:
    changed = model()
    layer = changed.encoder.layers[0]
    layer.fc1 = nnx.LoRALinear(layer.fc1.in_features, layer.fc1.out_features, lora_rank=2, rngs=nnx.Rngs(0))
    return changed


def with_our_lora() -> Whisper:
    return add_lora(model(), LoraConfig(rank=2, targets=("fc2",)), nnx.Rngs(0))


def with_head() -> Whisper:
    changed = model()
    changed.head = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
    return changed


def with_array() -> Whisper:
    changed = model()
    changed.encoder.gain = nnx.data(jnp.ones(3))
    return changed


def without_layer() -> Whisper:
    changed = model()
    changed.decoder.layers.pop()
    return changed


def without_bias() -> Whisper:
    changed = model()
    changed.encoder.layers[0].fc1.bias = None
    return changed


def of_another_width() -> Whisper:
    changed = model()
    changed.encoder.layers[0].fc1 = nnx.Linear(16, 48, rngs=nnx.Rngs(0))
    return changed


def with_shared_kernels() -> Whisper:
    changed = model()
    first, second = changed.decoder.layers
    second.fc1.kernel = second.fc2.kernel = first.fc1.kernel
    return changed


def with_shared_layers() -> Whisper:
    changed = model()
    changed.decoder.layers[1] = changed.decoder.layers[0]
    return changed


def of_whole_numbers() -> Whisper:
    changed = model()
    kernel = changed.encoder.layers[0].fc1.kernel
    kernel.set_value(kernel[...].astype(jnp.int32))
    return changed


@pytest.mark.parametrize("format", ["save_pretrained", *WRITERS])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_flax_lora, r"unexpected: encoder.layers.0.fc1.lora.lora_a, .*lora_b; merge LoRA into the kernels first"),
        (with_our_lora, r"missing: .*fc2.kernel.*; unexpected: .*fc2.a, .*fc2.b.*; merge LoRA .*training.lora.merge"),
        (with_head, "unexpected: head.bias, head.kernel; remove the added modules, or save them separately"),
        (with_array, "unexpected: encoder.gain; remove the added modules"),
        (
            without_layer,
            r"missing: decoder.layers.1\..* and \d+ more; if layers were removed or resized, set model.config",
        ),
        (without_bias, "missing: encoder.layers.0.fc1.bias; "),
        (
            of_another_width,
            r"misshapen: .*fc1.kernel is \(16, 48\), expected \(16, 64\); if layers were removed or resized, set",
        ),
        (
            with_shared_kernels,
            "shared: decoder.layers.1.fc1.kernel is decoder.layers.0.fc1.kernel, decoder.layers.1.fc2.kernel "
            r"is decoder.layers.0.fc1.kernel; replace shared layers by copies \(flax.nnx.clone",
        ),
        (with_shared_layers, r"shared: decoder.layers.1\..* and \d+ more; replace shared layers"),
        (of_whole_numbers, r"not floating point: encoder.layers.0.fc1.kernel \(int32\); convert"),
    ],
)
def test_a_model_that_differs_from_its_configuration_is_rejected_by_name(make, message, format, tmp_path):
    with pytest.raises(CheckpointError, match=message) as raised:
        save_pretrained(make(), tmp_path / "to") if format == "save_pretrained" else save_model(
            make(), tmp_path / "to", format
        )
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_configuration_was_corrected_is_saved(tmp_path):
    shorter = without_layer()
    shorter.config = dataclasses.replace(shorter.config, decoder_layers=1)
    save_pretrained(shorter, tmp_path)
    mel = small_mel(1)
    np.testing.assert_array_equal(load_model(tmp_path)(mel, jnp.ones((1, 3), int)), shorter(mel, jnp.ones((1, 3), int)))


def test_shared_layers_are_saved_after_copying(tmp_path):
    changed = with_shared_layers()
    changed.decoder.layers[1] = nnx.clone(changed.decoder.layers[0])
    save_pretrained(changed, tmp_path)
    mel, ids = small_mel(1), jnp.ones((1, 3), int)
    np.testing.assert_array_equal(load_model(tmp_path)(mel, ids), changed(mel, ids))


def test_merged_lora_is_saved(tmp_path):
    trained = with_our_lora()
    for _, module in nnx.iter_modules(trained):
        if type(module).__name__ == "LoraLinear":
            module.b.set_value(jnp.ones_like(module.b[...]))
    save_pretrained(merge(trained), tmp_path)
    mel, ids = small_mel(1), jnp.ones((1, 3), int)
    np.testing.assert_allclose(load_model(tmp_path)(mel, ids), trained(mel, ids), atol=1e-4)


def test_variables_that_do_not_affect_outputs_are_dropped(tmp_path):
    watched = model()
    watched.encoder.seen = nnx.Intermediate(jnp.ones(3))
    watched.noise = nnx.Rngs(0)
    save_pretrained(watched, tmp_path)
    mel, ids = small_mel(1), jnp.ones((1, 3), int)
    np.testing.assert_array_equal(load_model(tmp_path)(mel, ids), watched(mel, ids))

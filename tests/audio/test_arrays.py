"""Recordings in the forms that other libraries use."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from tests.audio.test_loading import as_int16, tone, write_wav
from whisper_nnx.audio.loading import SAMPLE_RATE, AudioError, load_audio

RATE = 22_050


class Decoder:
    """Imitates torchcodec's AudioDecoder and its subclass in `datasets`."""

    def __init__(self, samples: np.ndarray, rate: int):
        self._samples = SimpleNamespace(data=jnp.asarray(samples), sample_rate=rate)

    def get_all_samples(self) -> SimpleNamespace:
        return self._samples

    def __getitem__(self, key: str):
        return {"array": self._samples.data.mean(axis=0), "sampling_rate": self._samples.sample_rate}[key]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (RATE, x),  # gradio
        lambda x: (RATE, np.stack([x, x], axis=1)),
        lambda x: (x, RATE),  # librosa
        lambda x: (x, float(RATE)),
        lambda x: (np.int64(RATE), x),
        lambda x: [RATE, x],
        lambda x: {"array": x, "sampling_rate": RATE},  # datasets
        lambda x: {"path": "a.wav", "array": x, "sampling_rate": RATE},
        lambda x: {"audio": {"path": None, "array": x, "sampling_rate": RATE}},
        lambda x: {"raw": x, "sampling_rate": RATE},  # transformers
        lambda x: Decoder(np.stack([x, x]), RATE),
        lambda x: {"audio": Decoder(x[None], RATE)},
        lambda x: Decoder(x[None], RATE).get_all_samples(),
        lambda x: (RATE, jnp.asarray(x)),
    ],
)
def test_every_form_of_a_recording_gives_its_samples(form):
    samples = tone(0.5, RATE)
    np.testing.assert_allclose(load_audio(form(samples)), load_audio(samples, RATE), rtol=0, atol=1e-7)


def test_integers_from_gradio_are_scaled():
    samples = as_int16(tone(0.5))
    np.testing.assert_array_equal(load_audio((SAMPLE_RATE, samples)), samples / np.float32(2**15))


def test_dictionaries_of_files_are_read(tmp_path):
    path = write_wav(tmp_path / "a.wav", as_int16(tone(0.5)))
    for form in ({"bytes": path.read_bytes(), "path": "gone.wav"}, {"bytes": None, "path": str(path)}, {"audio": path}):
        np.testing.assert_array_equal(load_audio(form), load_audio(path))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_jax_floats_are_read(dtype):
    samples = np.round(tone(0.5) * 2**6) / 2**6  # exact in each
    np.testing.assert_array_equal(load_audio(jnp.asarray(samples, dtype)), samples)


@pytest.mark.parametrize("shape", [(3, 3), (32, 48_000), (80, 3000), (16_000, 17), (1, 2, 100)])
def test_ambiguous_shapes_are_rejected(shape):
    with pytest.raises(AudioError, match=rf"the array has shape \({', '.join(map(str, shape))}\)"):
        load_audio(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ((RATE, tone(0.5)), {"sampling_rate": 8000}, "sampling_rate=8000 contradicts the recording's own 22050"),
        ((RATE + 0.5, tone(0.5)), {}, "sampling_rate=22050.5 must be a whole number"),
        ((True, tone(0.5)), {}, "sampling_rate=True must be"),
        ({"array": tone(0.5), "rate": RATE}, {}, "a recording's dictionary has 'rate'; give one of 'array', 'raw'"),
        ({"sampling_rate": RATE}, {}, "a recording's dictionary has 'sampling_rate'; it lacks 'array'"),
        ({"bytes": b"", "sampling_rate": RATE}, {}, "sampling_rate=22050 applies to arrays"),
        ((RATE, RATE), {}, "audio of type tuple is not supported"),
    ],
)
def test_inconsistent_forms_are_rejected_in_one_line(source, options, message):
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(source, **options)
    assert "\n" not in str(caught.value)

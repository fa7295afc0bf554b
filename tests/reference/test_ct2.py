"""CTranslate2's own converter and faster-whisper: what it makes of our folders, and what we read of its files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from tests.small import quick_compilation  # noqa: F401
from weight_loader import load_model, save_model, save_pretrained
from weight_loader.load import abstract_model
from whisper_nnx import transcribe
from whisper_nnx.model.config import RELEASED
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.text.tokenizer import Tokenizer

converters = pytest.importorskip("ctranslate2.converters")
faster_whisper = pytest.importorskip("faster_whisper")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
COPIED = ["tokenizer.json", "preprocessor_config.json"]


def converted(folder: Path, path: Path, quantization: str) -> Path:
    """What `ct2-transformers-converter` runs."""
    converters.TransformersConverter(str(folder), copy_files=COPIED).convert(str(path), quantization=quantization)
    return path


def arrays(model: Whisper) -> dict:
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


@pytest.fixture(scope="module")
def ours(digits):
    return load_model(digits)


@pytest.fixture(scope="module")
def float32(ours, tmp_path_factory) -> Path:
    """Converted from what we save."""
    folder = tmp_path_factory.mktemp("ct2")
    save_pretrained(ours, folder / "hf")
    return converted(folder / "hf", folder / "ct2", "float32")


def assert_same(loaded: Whisper, expected: Whisper):
    assert loaded.config == expected.config
    assert loaded.tokenizer.special == expected.tokenizer.special
    for path, array in arrays(expected).items():
        np.testing.assert_array_equal(arrays(loaded)[path], array, err_msg=str(path))


@pytest.mark.slow
def test_floats_come_back_bit_for_bit(digits, ours, float32, tmp_path):
    assert_same(load_model(float32), ours)
    assert_same(load_model(converted(digits, tmp_path / "half", "float16")), ours)


def test_without_its_tokenizer_json_the_list_of_tokens_serves(ours, float32, tmp_path):
    for name in ("model.bin", "config.json", "vocabulary.json"):
        shutil.copy(float32 / name, tmp_path)
    tokenizer = load_model(tmp_path).tokenizer
    assert tokenizer.special == ours.tokenizer.special
    assert tokenizer.non_speech_tokens == ours.tokenizer.non_speech_tokens
    assert tokenizer.encode(" où être? 東京 don't") == ours.tokenizer.encode(" où être? 東京 don't")


def test_eight_bits_lie_within_half_a_127th_of_their_row(digits, ours, tmp_path):
    loaded = arrays(load_model(converted(digits, tmp_path / "ct2", "int8_float16")))
    for path, array in arrays(ours).items():
        is_matrix = path[-1] == "kernel" or path[-2:] == ("embed_tokens", "embedding")
        outputs = -1 if path[-1] == "kernel" else 0  # which axis of ours the stored rows are
        others = tuple(axis for axis in range(array.ndim) if axis != outputs % array.ndim)
        step = np.abs(array).max(axis=others, keepdims=True) / 127 if is_matrix else 0
        assert (np.abs(loaded[path] - array) <= 0.501 * step).all(), path


@pytest.mark.slow
def test_the_true_shape_of_tiny_comes_back_bit_for_bit(digits, tmp_path):
    config, random = RELEASED["tiny"], np.random.default_rng(0)
    tiny = abstract_model(config)
    state = {p: random.standard_normal(v.shape, np.float32) for p, v in nnx.to_flat_state(nnx.state(tiny))}
    nnx.update(tiny, nnx.State.from_flat_path(state))
    tiny.tokenizer = Tokenizer.from_folder(digits, config.vocab_size)
    save_model(tiny, tmp_path / "ct2", "ct2")
    loaded = arrays(load_model(tmp_path / "ct2"))
    for path, array in state.items():
        np.testing.assert_array_equal(loaded[path], array, err_msg=str(path))


def test_faster_whisper_transcribes_what_we_save_as_we_do(ours, float32, recordings):
    theirs = faster_whisper.WhisperModel(str(float32), device="cpu", compute_type="float32", cpu_threads=2)
    for name, language in (("en_short_3s", "en"), ("de_40s", "de")):
        options = {"language": language, "temperature": 0.0, "condition_on_previous_text": False}
        segments, _ = theirs.transcribe(recordings[name], beam_size=1, without_timestamps=False, **options)
        result = transcribe(ours, recordings[name], **options)
        found = [(segment.text, segment.start, segment.end) for segment in segments]
        assert [text for text, *_ in found] == [segment["text"] for segment in result["segments"]], name
        times = [[segment["start"], segment["end"]] for segment in result["segments"]]
        np.testing.assert_allclose([times for _, *times in found], times, atol=0.011)


def test_alignment_heads_and_languages_travel_with_the_weights(ours, float32):
    config = json.loads((float32 / "config.json").read_bytes())
    assert config["alignment_heads"] == [list(pair) for pair in ours.config.alignment_heads]
    assert config["lang_ids"] == [i for _, i in ours.tokenizer.special.languages]
    assert set(ours.tokenizer.non_speech_tokens) < set(config["suppress_ids"])

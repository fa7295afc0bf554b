"""The audio's keys and values in 8 bits: what they are off by, and that everything works with them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import quick_compilation, small_mel, small_model  # noqa: F401
from weight_loader import load_model, save_pretrained
from whisper_nnx import keep_programs, ops, transcribe
from whisper_nnx.model.cache import KeysValues, KVCache, from_cache, to_cache
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.runtime.programs import Program
from whisper_nnx.transcription.windows import encode_windows

ROWS, HEADS, T = 3, 2, 30
RECORDINGS = [np.random.default_rng(n).normal(0, 0.1, 9_000 * (n + 1)).astype(np.float32) for n in range(2)]
GREEDY = {"language": "en", "temperature": 0.0, "sample_len": 8, "no_speech_threshold": None}
BEAMS = {**GREEDY, "beam_size": 3, "word_timestamps": True, "alignment_heads": [(1, 0)]}
SAMPLES = {**GREEDY, "language": None, "temperature": 0.7, "best_of": 2}


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model(kv_cache_dtype="int8")


@pytest.fixture(params=["reference", "cpu", "accelerator"])
def implementation(request):
    with ops.using(request.param):
        yield request.param


@pytest.mark.parametrize(("width", "dtype"), [(8, jnp.float32), (64, jnp.bfloat16)])  # 64: by the kernel on a CPU
def test_attention_is_off_by_what_was_rounded(implementation, width, dtype):
    """To the rounded numbers exactly; from the attention before rounding by what half a step can change."""
    q, k, v = (normal(i, ROWS, HEADS, n, width, dtype=dtype) for i, n in enumerate((4, T, T)))
    k = k * jnp.asarray(np.geomspace(0.01, 10, width) / width, dtype)  # channels differ in size
    [stored] = to_cache((KeysValues(k, v),), "int8")
    rounded = tuple(from_cache(stored, HEADS))
    found = jax.jit(partial(ops.cached_attention, end=stored.positions))(q, stored.k, stored.v)
    assert found.dtype == dtype
    exact = ops.attention(*(x.astype(jnp.float32) for x in (q, *rounded)))
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=1e-5 if dtype == jnp.float32 else 0.03)

    steps = [(jnp.abs(x).max(axis=2, keepdims=True) / 127).astype(jnp.float32) for x in (k, v)]
    for before, after, step in zip((k, v), rounded, steps, strict=True):
        more = 0 if dtype == jnp.float32 else 2**-8 * jnp.abs(before)  # what is returned is rounded to bfloat16 again
        assert (jnp.abs(after.astype(jnp.float32) - before) <= 0.503 * step + more).all()
    if dtype == jnp.float32:
        of_scores = (jnp.abs(q) * steps[0]).sum(axis=-1).max() / 2 / width**0.5
        bound = jnp.expm1(2 * of_scores) * jnp.abs(v).max() + steps[1].max() / 2
        assert jnp.abs(found - ops.attention(q, k, v)).max() <= bound < 0.4


def test_what_is_stored_takes_a_byte_for_each_number():
    cross = (KeysValues(*(normal(i, ROWS, HEADS, T, 8, dtype=jnp.bfloat16) for i in range(2))),)
    for name, shape, scales in (
        ("reference", (ROWS, HEADS, T, 8), (ROWS, HEADS, 1, 8)),
        ("accelerator", (ROWS, 32, 16), (ROWS, 1, 16)),  # positions are padded
    ):
        with ops.using(name):
            stored = to_cache(cross, "int8")
            held = [(x.shape, x.dtype) for x in jax.tree.leaves(stored)]
            assert held == [(shape, jnp.int8), (scales, jnp.bfloat16)] * 2
            cache = KVCache.init(stored, 6)  # of the text: as ever
            assert [x.dtype for x in jax.tree.leaves(cache.self_attention)] == [jnp.bfloat16] * 2
            assert cache.cross_attention == stored


def test_logits_hardly_differ(model):
    """Rounding changes a number by 0.5 % of its channel's spread, and random layers make more of it."""
    plain, ids, mel = small_model(), jnp.array([[300, 301, 302, 303, 5, 6, 7]] * ROWS), small_mel(ROWS)

    @jax.jit
    def logits(model):
        hidden, _ = model.decoder.step(ids, KVCache.init(encode_windows(model, mel).cross, 32))
        return model.decoder.logits(hidden)

    before, after = logits(plain), logits(model)
    assert 0 < (after - before).std() < 0.02 * before.std()


def written(result):
    words = [word for segment in result["segments"] for word in segment.get("words", ())]
    return [s["tokens"] for s in result["segments"]], [(w["word"], w["start"]) for w in words], result["language"]


@pytest.mark.parametrize(("name", "options"), [("cpu", SAMPLES), ("accelerator", BEAMS)])
def test_batches_are_transcribed_as_each_recording_alone(model, name, options):
    with ops.using(name):
        together = transcribe(model, RECORDINGS, batch_size=2, **options)
        alone = [transcribe(model, recording, **options) for recording in RECORDINGS]
    assert list(map(written, together)) == list(map(written, alone))
    assert any(result["segments"] for result in together)


def test_programs_with_it_are_stored_and_those_without_are_others(model, tmp_path, monkeypatch):
    made, export = [], Program.exported
    monkeypatch.setattr(Program, "exported", lambda self, *args: made.append(self.__name__) or export(self, *args))
    found = []
    for one in (model, small_model(), model):
        keep_programs(tmp_path)
        found.append(transcribe(one, RECORDINGS[0], **GREEDY))
        keep_programs(None)
    assert found[0] == found[2]
    assert [made.count(name) for name in ("_encode", "generate")] == [2, 2]


def test_a_model_is_loaded_with_it_or_refused(tmp_path):
    save_pretrained(small_model(), tmp_path)
    for dtype in ("int8", jnp.int8):
        loaded = load_model(tmp_path, dtype="bfloat16", kv_cache_dtype=dtype)
        assert "computes in bfloat16, audio keys and values in int8" in repr(loaded)
        assert encode_windows(loaded, small_mel(1)).cross[0].k.values.dtype == jnp.int8
    assert load_model(tmp_path).decoder.kv_cache_dtype is None
    with pytest.raises(ValueError, match=r"kv_cache_dtype='fp8' is not supported; choose int8, or None"):
        load_model(tmp_path, kv_cache_dtype="fp8")


@pytest.mark.real
@pytest.mark.slow
def test_a_released_model_writes_the_same_text(real_tiny_en, real_speech):
    expected = " He began a confused complaint against the wizard, who had vanished behind the curtain on the left."
    model = load_model(str(real_tiny_en), kv_cache_dtype="int8")
    assert transcribe(model, real_speech("en_libri_5s.flac"), temperature=0.0)["text"] == expected

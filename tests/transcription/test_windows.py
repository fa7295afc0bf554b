"""Around the decoding of windows: what it starts with, languages, what is compiled when, and what cannot be done."""

import re
import zlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import ROWS, PlainDecoder
from tests.small import quick_compilation, small_config, small_mel, small_model, small_tokenizer  # noqa: F401
from whisper_nnx import ops, transcribe
from whisper_nnx.decoding.options import DecodingOptions
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.text.tokenizer import Tokenizer
from whisper_nnx.transcription.attempts import compression_ratio, initial_ids
from whisper_nnx.transcription.suppression import suppressed_tokens
from whisper_nnx.transcription.windows import _encode, decode, decode_windows, detect_language, encode_windows

CONTEXT = small_config().max_target_positions
TOKENIZER = small_tokenizer()
SPECIAL = TOKENIZER.special
PROMPT = tuple(range(100, 140))
GERMAN = DecodingOptions(language="de")


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model(decoder_layers=1)


@pytest.fixture(scope="module")
def mel() -> jax.Array:
    return small_mel(ROWS)


def start_of(language: str = "de", task: int = SPECIAL.transcribe) -> list[int]:
    return [SPECIAL.sot, dict(SPECIAL.languages)[language], task]


# What a window starts with.

texts = st.lists(st.integers(0, 255), max_size=60).map(tuple)


@settings(deadline=None)
@given(texts, texts, st.one_of(st.none(), st.integers(1, 60)), st.booleans(), st.integers(16, 60))
def test_initial_ids_leave_room_to_sample_and_lose_what_is_furthest_back(prompt, prefix, sample_len, times, context):
    options = replace(GERMAN, prompt=prompt, prefix=prefix, sample_len=sample_len, without_timestamps=not times)
    ids, _, said = initial_ids(options, TOKENIZER, context)
    assert len(ids) < context
    start = ids.index(SPECIAL.sot)
    expected = start_of() if times else [*start_of(), SPECIAL.no_timestamps]
    assert ids[start:] == [*expected, *said]
    if said and times:
        assert said[0] == SPECIAL.timestamp_begin
        said = said[1:]
    assert said == list(prefix[len(prefix) - len(said) :])
    assert bool(said) == bool(prefix)
    if start:
        assert ids[0] == SPECIAL.sot_prev
        assert start <= context // 2
        assert ids[1:start] == list(prompt[-(start - 1) :])
    if sample_len and sample_len < context // 2:
        assert len(said) <= context // 2 - sample_len


def test_a_prompt_beyond_half_the_context_loses_its_beginning():
    ids, _, _ = initial_ids(replace(GERMAN, prompt=PROMPT), TOKENIZER, CONTEXT)
    assert ids == [SPECIAL.sot_prev, *PROMPT[-(CONTEXT // 2 - 1) :], *start_of()]


def test_a_text_prompt_is_what_its_ids_are():
    ids, _, _ = initial_ids(replace(GERMAN, prompt="  one and two "), TOKENIZER, CONTEXT)
    assert ids == [SPECIAL.sot_prev, *TOKENIZER.encode(" one and two"), *start_of()]
    for nothing in ("", "  ", ()):
        assert initial_ids(replace(GERMAN, prompt=nothing), TOKENIZER, CONTEXT) == (start_of(), 0, [])


def test_a_prefix_begins_with_a_timestamp_unless_there_are_none():
    words = TOKENIZER.encode(" one")
    begin = SPECIAL.timestamp_begin
    assert initial_ids(replace(GERMAN, prefix="one"), TOKENIZER, CONTEXT).prefix == [begin, *words]
    assert initial_ids(replace(GERMAN, prefix=(begin + 3, *words)), TOKENIZER, CONTEXT).prefix == [begin + 3, *words]
    without = replace(GERMAN, prefix="one", without_timestamps=True)
    assert initial_ids(without, TOKENIZER, CONTEXT).prefix == words


def test_the_start_names_language_and_task():
    translate = DecodingOptions(language="fr", task="translate")
    assert initial_ids(translate, TOKENIZER, CONTEXT).ids == start_of("fr", SPECIAL.translate)
    without = replace(GERMAN, without_timestamps=True)
    assert initial_ids(without, TOKENIZER, CONTEXT).ids == [*start_of(), SPECIAL.no_timestamps]


def test_an_english_only_start_names_no_language_and_no_task():
    english = small_tokenizer(languages=())
    assert initial_ids(DecodingOptions(), english, CONTEXT) == ([english.special.sot], 0, [])


# What is never sampled.


@pytest.mark.parametrize("regex", [".*[13579]", " ?[a-z]", " ", "é?"])
def test_tokens_of_which_the_whole_text_matches_are_never_sampled(model, regex):
    options = replace(GERMAN, suppress_tokens=(), suppress_regex=regex)
    never, _ = suppressed_tokens(TOKENIZER, model.config.vocab_size, options)
    usual, _ = suppressed_tokens(TOKENIZER, model.config.vocab_size, replace(options, suppress_regex=None))
    texts = {i for i in range(SPECIAL.eot) if re.fullmatch(regex, TOKENIZER.decode([i]))}
    assert {*np.flatnonzero(never)} - {*np.flatnonzero(usual)} == texts
    assert texts or regex == "é?"


def test_rows_with_different_regular_expressions_are_decoded_each_by_its_own(model, mel):
    options = [replace(GERMAN, suppress_regex=regex, without_timestamps=True) for regex in (None, ".*", "[^a-y]*", "z")]
    results = decode_windows(model, encode_windows(model, mel), options, range(ROWS))
    for result, window, o in zip(results, mel, options, strict=True):
        tokens, _ = PlainDecoder(model, window, o, [*start_of(), SPECIAL.no_timestamps]).greedy()
        assert result.tokens == tokens


def test_turns_of_speakers_are_told_only_where_asked_for_and_are_no_text(mel):
    eager = small_model(decoder_layers=1)
    eager.decoder.layer_norm.bias[...] = 3 * eager.decoder.embed_tokens.embedding[SPECIAL.sot_lm]
    options = replace(GERMAN, max_new_tokens=9)
    for result, window in zip(decode(eager, mel, options, tinydiarize=True), mel, strict=True):
        tokens, _ = PlainDecoder(eager, window, replace(options, tinydiarize=True), start_of()).greedy()
        assert result.tokens == tokens
        assert SPECIAL.sot_lm in tokens
        assert result.text == TOKENIZER.decode(i for i in tokens if i != SPECIAL.sot_lm).strip()
    assert not any(SPECIAL.sot_lm in result.tokens for result in decode(eager, mel, options))


def test_turns_of_speakers_need_a_token(model, mel):
    deaf = small_model(decoder_layers=1)
    files = {name: data.replace(b"<|startoflm|>", b"<|other|>") for name, data in TOKENIZER.files.items()}
    deaf.tokenizer = Tokenizer.from_files(files, model.config.vocab_size)
    with pytest.raises(ValueError, match="tinydiarize=True"):
        decode(deaf, mel, GERMAN, tinydiarize=True)


# What else they may say, and what is done meanwhile.


@pytest.mark.parametrize(
    "strategy", [{"beam_size": 3}, {"beam_size": 3, "length_penalty": 0.3}, {"temperature": 0.7, "best_of": 3}]
)
def test_the_alternatives_are_the_best_candidates_in_order(model, mel, strategy):
    options = replace(GERMAN, **strategy)

    def score(a):
        total, n, alpha = a.avg_logprob * (len(a.tokens) + 1), len(a.tokens), options.length_penalty
        return total / (n if alpha is None else ((5 + n) / 6) ** alpha)

    results = [decode(model, mel, options, n_best=n) for n in (1, 2, 3)]
    for one, two, three in zip(*results, strict=True):
        assert one.alternatives == ()
        assert two.alternatives == three.alternatives[:2]
        first = three.alternatives[0]
        assert (first.tokens, first.text, first.avg_logprob) == (one.tokens, one.text, one.avg_logprob)
        assert {r.tokens for r in (one, two, three)} == {one.tokens}
        assert len({a.tokens for a in three.alternatives}) == 3
        assert [*map(score, three.alternatives)] == sorted(map(score, three.alternatives), reverse=True)
        assert all(a.text == TOKENIZER.decode(a.tokens).strip() for a in three.alternatives)


# Languages.


def test_language_probabilities_are_the_softmax_over_the_languages(model, mel):
    tokens, probs = detect_language(model, mel)
    ids = dict(SPECIAL.languages)
    for window, token, found in zip(mel, tokens, probs, strict=True):
        logits = PlainDecoder(model, window, GERMAN, [SPECIAL.sot]).logits([SPECIAL.sot])[0, [*ids.values()]]
        np.testing.assert_allclose([found[code] for code in ids], jax.nn.softmax(logits), atol=1e-5)
        assert token == ids[max(found, key=found.get)]


def test_one_window_has_one_language(model, mel):
    tokens, probs = detect_language(model, mel[:1])
    assert detect_language(model, mel[0]) == (tokens[0], probs[0])


def test_a_language_that_is_not_given_is_detected(model, mel):
    _, probs = detect_language(model, mel)
    for row, result in enumerate(decode(model, mel)):
        assert result.language == max(probs[row], key=probs[row].get)
        assert result.language_probs == pytest.approx(probs[row], abs=1e-5)
        given_language = decode(model, mel, language=result.language)[row]
        assert given_language.language_probs is None
        assert given_language.tokens == result.tokens


def test_the_task_lang_id_tells_the_language_and_nothing_else(model, mel):
    _, probs = detect_language(model, mel)
    for language in (None, "fr"):
        for row, result in enumerate(decode(model, mel, task="lang_id", language=language)):
            assert result.language == max(probs[row], key=probs[row].get)
            assert result.language_probs == pytest.approx(probs[row], abs=1e-5)
            assert (result.tokens, result.text) == ((), "")
            assert np.isnan([result.avg_logprob, result.no_speech_prob]).all()


def test_an_english_only_model_detects_and_translates_nothing(mel):
    english = small_model(decoder_layers=1, tokenizer=small_tokenizer(languages=()))
    with pytest.raises(ValueError, match="English-only"):
        detect_language(english, mel)
    for changes in ({"task": "lang_id"}, {"task": "translate"}, {"language": "de"}):
        with pytest.raises(ValueError, match=f"English-only.*{next(iter(changes.values()))}"):
            decode(english, mel, **changes)


def test_an_unknown_language_is_an_error_that_names_it(model, mel):
    with pytest.raises(ValueError, match="'klingon'"):
        decode(model, mel, language="klingon")
    with pytest.raises(ValueError, match=r"'ja'.*en, de, es, fr"):
        decode(model, mel, language="ja")


# What may be given.


def test_one_window_gives_one_result_and_a_batch_a_list(model, mel):
    alone = decode(model, mel[0], GERMAN)
    (first,) = decode(model, mel[:1], GERMAN)
    assert alone.tokens == first.tokens == decode(model, mel, GERMAN)[0].tokens
    assert alone.audio_features.shape == (50, 16)


def test_encoder_output_serves_in_place_of_the_mel(model, mel):
    features = encode_windows(model, mel).features
    for a, b in zip(decode(model, features, GERMAN), decode(model, mel, GERMAN), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.avg_logprob, b.avg_logprob, atol=1e-5)
        np.testing.assert_array_equal(a.audio_features, b.audio_features)
    assert decode(model, features[0], GERMAN).tokens == decode(model, mel[0], GERMAN).tokens


def test_numpy_in_any_precision_is_a_mel_too(model, mel):
    expected = [result.tokens for result in decode(model, mel, GERMAN)]
    assert [result.tokens for result in decode(model, np.asarray(mel, np.float64), GERMAN)] == expected


def test_a_model_without_a_tokenizer_says_so(mel):
    model = small_model(decoder_layers=1)
    model.tokenizer = None
    for call in (decode, detect_language):
        with pytest.raises(ValueError, match="no tokenizer"):
            call(model, mel)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"suppress_tokens": (5, 338)}, "338"),
        ({"suppress_tokens": "-2"}, "-2"),
        ({"prompt": (5, 338)}, "338"),
        ({"prefix": (-1,)}, "-1"),
    ],
)
def test_ids_outside_of_the_vocabulary_are_refused(model, mel, changes, told):
    with pytest.raises(ValueError, match=f"{told}.*vocabulary of 338"):
        decode(model, mel, GERMAN, **changes)


def test_compression_ratio_is_that_of_zlib_over_utf_8():
    text = "äh " * 50
    assert compression_ratio(text) == len(text.encode()) / len(zlib.compress(text.encode())) > 2.4
    assert compression_ratio("one two three") < 1
    assert compression_ratio("") == 0


# Compilation.


def test_a_new_shape_is_compiled_and_counted(model, compilations):
    encode_windows(model, jnp.ones((1, 8, 14)))
    assert compilations


@pytest.mark.parametrize("strategy", [{}, {"temperature": 0.7, "best_of": 3}, {"beam_size": 3}])
def test_nothing_is_compiled_after_the_first_call(model, mel, compilations, strategy):
    other = small_mel(ROWS, seed=9)
    decode(model, mel, GERMAN, **strategy)
    decode(model, mel, **strategy)
    decode(model, encode_windows(model, mel).features, GERMAN, **strategy)
    compilations.clear()
    for length in (0, 1, 23, 31, 32, 33, 40):
        decode(model, other, GERMAN, prompt=PROMPT[:length], **strategy)
    for changes in (
        {"language": "en"},
        {"language": None},
        {"language": "fr", "task": "translate"},
        {"sample_len": 3},
        {"sample_len": 1000},
        {"prefix": "one"},
        {"without_timestamps": True},
        {"max_initial_timestamp": None},
        {"max_initial_timestamp": 0.5},
        {"suppress_tokens": "1,2,3"},
        {"suppress_tokens": None},
        {"suppress_blank": False},
        {"length_penalty": 0.5},
        {"max_new_tokens": 3},
        {"suppress_regex": "a"},
        {"tinydiarize": True},
    ):
        decode(model, mel, replace(GERMAN, **changes), **strategy)
    for temperature in (0.2, 1.0) if strategy.get("temperature") else (0.0,):
        for seed in (1, 2):
            decode(model, mel, GERMAN, seed=seed, **{**strategy, "temperature": temperature})
    assert compilations == []


def test_greedy_and_sampling_share_one_compilation(model, mel, compilations):
    decode(model, mel, GERMAN)
    compilations.clear()
    for temperature in (0.1, 0.7, 1.0):
        decode(model, mel, GERMAN, temperature=temperature)
    mixed = [replace(GERMAN, temperature=temperature) for temperature in (0.0, 0.3, 0.0, 2.0)]
    decode_windows(model, encode_windows(model, mel), mixed, range(ROWS))
    assert compilations == []


def test_other_weights_need_no_compilation(mel, compilations, model):
    decode(model, mel, GERMAN)
    other = small_model(decoder_layers=1, seed=7)
    compilations.clear()
    decode(other, mel, GERMAN)
    assert compilations == []


# What a batch costs.


def test_a_batch_is_encoded_as_each_of_its_windows_alone(model, mel):
    together = jax.tree.leaves(encode_windows(model, mel))
    for row, window in enumerate(mel):
        for ours, alone in zip(together, jax.tree.leaves(encode_windows(model, window[None])), strict=True):
            np.testing.assert_array_equal(ours[row], alone[0])


@pytest.mark.skipif(jax.default_backend() != "cpu" or jax.device_count() > 1, reason="of a single CPU")
def test_what_encoding_holds_in_work_does_not_grow_with_the_batch(model, mel):
    def in_work(rows: int) -> int:
        batch = jax.ShapeDtypeStruct((rows, *mel.shape[1:]), mel.dtype)
        compiled = _encode.jitted.lower(model.encoder, model.decoder, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert in_work(12) < 1.5 * in_work(3)


@pytest.mark.parametrize("given_features", [False, True])
def test_keys_and_values_are_kept_as_the_token_loop_reads_them(mel, given_features):
    model = small_model(decoder_layers=1, dtype=jnp.bfloat16)
    encoded = encode_windows(model, mel)
    encoded = encode_windows(model, encoded.features) if given_features else encoded
    assert encoded.features.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(encoded.cross)} == {jnp.dtype(ops.current().cache_dtypes(jnp.bfloat16)[1])}


@pytest.mark.parametrize("function", [transcribe, decode, detect_language])
def test_what_is_no_model_is_named(function):
    with pytest.raises(TypeError, match="model is of type str, not a Whisper; load it with load_model"):
        function("tiny.en", np.zeros((80, 3000), np.float32))

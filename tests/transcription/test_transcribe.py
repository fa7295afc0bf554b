"""Whole recordings through the driver, on the trained checkpoint."""

import io
from dataclasses import replace

import numpy as np
import pytest

from weight_loader.load import abstract_model
from whisper_nnx import iter_segments, load_audio, load_model, transcribe
from whisper_nnx.output.colors import colored


@pytest.fixture(scope="module")
def model(digits):
    return load_model(str(digits))


@pytest.fixture(scope="module")
def short(shared):
    return shared / "audio" / "en_short_3s.flac"


def test_segments_come_one_by_one_and_are_those_of_the_transcript(model, shared):
    audio = load_audio(shared / "audio" / "de_40s.flac")
    stream = iter_segments(model, audio, temperature=0.0)
    assert stream.language == "de"
    first = next(stream)
    assert 0 < len(stream.transcript["segments"]) < 20
    assert [first, *stream] == transcribe(model, audio, temperature=0.0)["segments"] == stream.transcript["segments"]


def test_a_path_its_bytes_a_file_and_its_samples_say_the_same(model, short):
    samples = load_audio(short)
    texts = {
        transcribe(model, source, temperature=0.0)["text"]
        for source in (short, str(short), short.read_bytes(), io.BytesIO(short.read_bytes()), samples)
    }
    assert texts == {" Six zero nine."}
    slow = transcribe(model, np.repeat(samples, 2), sampling_rate=32_000, temperature=0.0)
    assert slow["text"] == " Six zero nine."


@pytest.mark.slow
def test_a_checkpoint_may_say_that_windows_are_not_told_the_text_before(model, shared, monkeypatch):
    audio = load_audio(shared / "audio" / "en_mixed_75s.flac")

    def text(**options) -> str:
        return transcribe(model, audio, language="en", temperature=0.0, **options)["text"]

    told, alone = (text(condition_on_previous_text=conditioned) for conditioned in (True, False))
    assert told != alone
    assert text() == told
    monkeypatch.setattr(model, "config", replace(model.config, condition_on_prev_tokens=False))
    assert text() == alone
    assert text(condition_on_previous_text=True) == told


def test_progress_ends_at_the_recordings_end(model, shared):
    calls: list[tuple[float, float]] = []
    audio = load_audio(shared / "audio" / "de_40s.flac")
    transcribe(model, audio, temperature=0.0, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == len(audio) // 160 / 100


def test_verbose_prints_segments_with_times(model, short, capsys):
    transcribe(model, short, temperature=0.0, verbose=True)
    printed = capsys.readouterr().out
    assert "Detected language: English" in printed
    assert "[00:00.000 --> 00:01.680]  Six zero nine." in printed


def test_print_colors_shows_each_word_in_the_color_of_its_probability(model, short, capsys):
    options = {"temperature": 0.0, "verbose": True, "language": "en", "print_colors": True}
    result = transcribe(model, short, word_timestamps=True, **options)
    words = [colored(w["word"], w["probability"]) for segment in result["segments"] for w in segment["words"]]
    assert capsys.readouterr().out.rstrip("\n").endswith(f"] {''.join(words)}")
    [segment] = transcribe(model, short, **options)["segments"]
    assert colored(" Six zero nine.", np.exp(segment["avg_logprob"])) in capsys.readouterr().out


def test_print_special_shows_timestamps_as_tokens(model, short, capsys):
    transcribe(model, short, temperature=0.0, verbose=True, language="en", print_special=True)
    assert "] <|0.16|> Six zero nine.<|1.68|>" in capsys.readouterr().out


def test_verbose_false_shows_a_bar_of_seconds_on_a_terminal(model, short, capsys, monkeypatch):
    monkeypatch.setattr("whisper_nnx.output.progress._is_terminal", lambda: True)
    transcribe(model, short, temperature=0.0, verbose=False, language="en")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "0:03 / 0:03" in captured.err
    assert "x real time" in captured.err


def test_nothing_compiles_after_the_first_recording(model, shared, compilations):
    """Other lengths, languages, tasks, prompts, prefixes, clips and temperatures share the same programs."""
    audio = load_audio(shared / "audio" / "en_one_speaker_30s.flac")[:160_000]
    ladder = {"temperature": (0.0, 0.5), "logprob_threshold": 0.0, "no_speech_threshold": None, "best_of": 2}
    transcribe(model, audio[:80_000], **ladder)
    assert compilations
    compilations.clear()
    transcribe(model, audio, language="de", task="translate", initial_prompt="one two three " * 40, **ladder)
    transcribe(model, audio[:33_333], prefix="One", clip_timestamps=[0.5, 1.5], **ladder)
    transcribe(model, audio[:99_999], without_timestamps=True, sample_len=9, **{**ladder, "temperature": (0.0, 0.9)})
    transcribe(model, audio[5_000:], suppress_tokens="-1,530", seed=7, max_initial_timestamp=None, **ladder)
    assert compilations == []


def test_a_seed_gives_the_same_samples_and_another_seed_others(model, short):
    def tokens(seed: int) -> list[int]:
        result = transcribe(model, short, temperature=1.0, seed=seed, logprob_threshold=None)
        return [token for segment in result["segments"] for token in segment["tokens"]]

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed)) for seed in range(5)}) > 1


def test_a_failed_threshold_climbs_the_ladder(model, short):
    climbed = transcribe(model, short, temperature=(0.0, 0.3), logprob_threshold=0.0, no_speech_threshold=None)
    assert {segment["temperature"] for segment in climbed["segments"]} == {0.3}


def test_words_come_in_order_and_make_up_the_text_of_their_segment(model, shared):
    result = transcribe(model, shared / "audio" / "en_mixed_75s.flac", temperature=0.0, word_timestamps=True)
    timed = result["segments"]
    assert timed
    for segment in timed:
        words = segment["words"]
        assert "".join(word["word"] for word in words) == segment["text"]
        starts = [word["start"] for word in words]
        assert starts == sorted(starts)
        assert segment["end"] >= words[-1]["end"]
        assert all(0 <= word["probability"] <= 1 and word["start"] <= word["end"] for word in words)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"language": "klingon"}, "klingon"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"temperature": ()}, "temperature"),
        ({"beam_size": 0}, "beam_size=0"),
        ({"patience": 2.0}, "patience=2.0"),
        ({"length_penalty": 2.0}, "length_penalty=2.0"),
        ({"clip_timestamps": "9,3"}, "9.0 to 3.0"),
        ({"clip_timestamps": "a,b"}, "a,b"),
        ({"suppress_tokens": "99999999"}, "99999999"),
        ({"clip_timestamps": 1.0}, "clip_timestamps=1.0"),
        ({"beam_size": 3, "patience": float("inf")}, "patience=inf"),
        ({"hallucination_silence_threshold": 1.0}, "word_timestamps=True"),
        ({"hallucination_silence_threshold": -1.0, "word_timestamps": True}, "=-1.0"),
        ({"task": "lang_id"}, "lang_id"),
        ({"prompt": "one"}, "initial_prompt"),
        ({"fp16": "no"}, "fp16='no'"),
    ],
)
def test_options_that_cannot_be_met_are_refused_with_their_value(model, short, options, says):
    with pytest.raises(ValueError, match=says):
        transcribe(model, short, **options)


def test_a_model_without_a_tokenizer_says_so(model, short):
    with pytest.raises(ValueError, match="no tokenizer"):
        transcribe(abstract_model(model.config), short)

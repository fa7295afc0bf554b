"""What one recording of a list raises is its own error; the others have the transcripts that they have alone."""

from functools import partial

import jax
import numpy as np
import pytest

from tests.audio.test_loading import as_int16, write_wav
from tests.small import quick_compilation, small_model  # noqa: F401
from whisper_nnx import load_audio, transcribe
from whisper_nnx.audio.features import RecordingMel
from whisper_nnx.audio.loading import AudioError
from whisper_nnx.cli.transcribe import main
from whisper_nnx.model.whisper import Whisper
from whisper_nnx.transcription import batch, encoding, stream
from whisper_nnx.transcription.opening import open_recording
from whisper_nnx.transcription.options import TranscribeOptions
from whisper_nnx.transcription.recording import Recording
from whisper_nnx.transcription.row_decoder import RowDecoder
from whisper_nnx.transcription.stream import iter_segments
from whisper_nnx.transcription.windows import encode_windows

OPTIONS = {"language": "en", "temperature": 0.0}


def noise(seed: int, seconds: float = 2.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, round(seconds * 16_000)).astype(np.float32)


GOOD = [noise(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def model() -> Whisper:
    return small_model()


def told(result: object) -> object:
    """Without probabilities, whose last bits depend on the batch."""
    return [(s["start"], s["end"], s["tokens"]) for s in result["segments"]] if isinstance(result, dict) else result


@pytest.fixture(scope="module")
def alone(model):
    return [told(transcribe(model, samples, **OPTIONS)) for samples in GOOD]


class Raising:
    """An array of a library that raises what it likes."""

    def __init__(self, error: BaseException):
        self._error = error

    def __array__(self, *_: object, **__: object) -> np.ndarray:
        raise self._error


BAD = {
    "not a number": (np.full(9000, np.nan, np.float32), "sample 0 of the array is nan", AudioError),
    "no file": ("nowhere.wav", "check the path", FileNotFoundError),
    "nothing": (None, "type NoneType", AudioError),
    "no memory": (Raising(MemoryError("no room")), "no room", MemoryError),
    "a defect of a library": (Raising(KeyError("x")), "x", KeyError),
    "no option": ({"audio": noise(9), "bean_size": 5}, "has no option 'bean_size'", TypeError),
    "no such value": ({"audio": noise(9), "beam_size": 0}, "beam_size=0", ValueError),
    "no language": ({"audio": noise(9), "language": "klingon"}, "klingon", ValueError),
    "a language of others": ({"audio": noise(9), "language": "cy"}, "cy|Welsh|welsh", ValueError),
    "no audio": ({"language": "de"}, "lacks 'audio'", ValueError),
    "tokens of no vocabulary": ({"audio": noise(9), "suppress_tokens": "999999"}, "", Exception),
    "no expression": ({"audio": noise(9), "suppress_regex": "("}, "", ValueError),
}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_recording_among_others_is_an_exception_in_its_place(model, alone, name, batch_size):
    bad, message, kind = BAD[name]
    first, error, *others = transcribe(model, [GOOD[0], bad, *GOOD[1:]], batch_size=batch_size, **OPTIONS)
    assert [*map(told, [first, *others])] == alone
    assert isinstance(error, kind)
    assert message in str(error) or any(part in str(error) for part in message.split("|"))


def test_progress_goes_on_beside_a_bad_recording(model, alone):
    seen = []
    bad = {"audio": noise(9), "sampling_rate": "16000"}
    results = transcribe(model, [GOOD[0], bad, *GOOD[1:]], progress=lambda *now: seen.append(now), **OPTIONS)
    assert isinstance(results.pop(1), AudioError)
    assert [*map(told, results)] == alone
    assert seen[-1][0] == seen[-1][1]
    assert [now[0] for now in seen] == sorted(now[0] for now in seen)


def test_what_is_wrong_for_all_is_raised_at_once(model):
    with pytest.raises(ValueError, match="beam_size=0"):
        transcribe(model, GOOD, beam_size=0)


def test_an_interruption_ends_all(model):
    with pytest.raises(KeyboardInterrupt):
        transcribe(model, [GOOD[0], Raising(KeyboardInterrupt())], **OPTIONS)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("method", ["next_window", "draft", "accept"])
def test_a_recording_that_fails_in_its_second_window_is_alone_with_it(model, alone, monkeypatch, method, batch_size):
    right = getattr(Recording, method)
    calls: dict[int, int] = {}

    def fails(self: Recording, *args: object) -> object:
        calls[id(self)] = calls.get(id(self), 0) + 1
        if self.language == "de" and calls[id(self)] >= 2:
            raise ZeroDivisionError("the second")
        return right(self, *args)

    monkeypatch.setattr(Recording, method, fails)
    bad = {"audio": noise(7), "language": "de"}
    first, error, *others = transcribe(model, [GOOD[0], bad, *GOOD[1:]], batch_size=batch_size, **OPTIONS)
    assert isinstance(error, ZeroDivisionError)
    assert [*map(told, [first, *others])] == alone
    with pytest.raises(ZeroDivisionError):
        transcribe(model, bad, temperature=0.0)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("work", ["decode", "encode"])
@pytest.mark.parametrize("message", ["INTERNAL: the device has a fault", "RESOURCE_EXHAUSTED: out of memory"])
@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_recording_that_the_device_cannot_do_is_alone_with_it(model, alone, monkeypatch, work, message, batch_size):
    """Whatever the device raises, even when memory does not suffice for one row."""

    class Fails(RowDecoder):
        def decode(self, wanted, *rest):
            if any(one.options.language == "de" for one in wanted.values()):
                self._rows, self._begun = None, {}
                raise jax.errors.JaxRuntimeError(message)
            return super().decode(wanted, *rest)

    def encode(model: Whisper, windows: object) -> object:
        if bool((np.asarray(windows) == german_mel).all()):
            raise jax.errors.JaxRuntimeError(message)
        return encode_windows(model, windows)

    frames = 2 * model.config.max_source_positions
    german_mel = np.asarray(RecordingMel(noise(7), model.config.num_mel_bins, frames).window(0, frames)[None])
    changed = {"make_decoder": Fails} if work == "decode" else {"encode": encode}
    monkeypatch.setattr(stream, "Batch", partial(batch.Batch, **changed))
    bad = {"audio": noise(7), "language": "de"}
    first, error, *others = transcribe(model, [GOOD[0], bad, *GOOD[1:]], batch_size=batch_size, **OPTIONS)
    assert isinstance(error, jax.errors.JaxRuntimeError)
    assert [*map(told, [first, *others])] == alone


@pytest.mark.parametrize("message", ["INTERNAL: the device has a fault", "RESOURCE_EXHAUSTED: out of memory"])
@pytest.mark.parametrize(
    ("where", "name"), [(stream._Recordings, "_open"), (encoding, "start_detection"), (batch, "fetch")]
)
@pytest.mark.filterwarnings("ignore:out of memory")
def test_windows_on_their_way_to_a_row_survive_an_error(model, monkeypatch, where, name, message):
    """It is raised once: while a recording is opened, while a window is encoded, or when its language is read."""
    right, calls = getattr(where, name), []
    options = {"temperature": 0.0, "sample_len": 4}
    # The first window with these options is encoded before the others, its language detected again when it is decoded.
    several = {"audio": GOOD[0], "language_detection_segments": 2, "multilingual": True}
    expected = [told(transcribe(model, source, **options)) for source in [several, *GOOD[1:]]]

    def fails(*args: object) -> object:
        calls.append(args)
        if len(calls) == (3 if name == "_open" else 1):
            raise jax.errors.JaxRuntimeError(message)
        return right(*args)

    monkeypatch.setattr(where, name, fails)
    results = [*map(told, transcribe(model, [several, *GOOD[1:]], batch_size=4, **options))]
    wrong = [result for result, right in zip(results, expected, strict=True) if result != right]
    assert len(wrong) <= message.startswith("INTERNAL")
    assert all(isinstance(error, jax.errors.JaxRuntimeError) for error in wrong)


def test_no_other_piece_of_a_recording_begins_after_one_has_failed(model):
    """Also of those that were taken from the queue together with it."""
    options = TranscribeOptions.of(language="en", clip_timestamps="0,0.5,1,1.5,2,2.4", independent_clips=True)
    opened = open_recording(model, GOOD[0], options)
    opened.lives[1].recording.next_window = lambda: 1 / 0
    driven = batch.Batch(model, 4)
    for live in opened.lives:
        driven.submit(live)
    [(_, error)] = driven.run(iter(()))
    assert isinstance(error, ZeroDivisionError)


def test_the_other_pieces_of_a_recording_that_failed_are_dropped(model, alone, monkeypatch):
    right = Recording.draft

    def fails(self: Recording, window: object, result: object) -> object:
        if self.language == "de" and self.piece and self.piece[0] == 100:
            raise ZeroDivisionError("the second piece")
        return right(self, window, result)

    monkeypatch.setattr(Recording, "draft", fails)
    bad = {"audio": noise(7), "language": "de", "clip_timestamps": "0,0.5,1,1.5,2,2.4", "independent_clips": True}
    for batch_size in (1, 2, 4):
        first, error, *others = transcribe(model, [GOOD[0], bad, *GOOD[1:]], batch_size=batch_size, **OPTIONS)
        assert isinstance(error, ZeroDivisionError)
        assert [*map(told, [first, *others])] == alone


def test_a_recording_of_its_own_raises_what_it_raises(model):
    with pytest.raises(AudioError, match="nan"):
        transcribe(model, np.full(9000, np.nan))
    with pytest.raises(AudioError, match="nan"):
        iter_segments(model, (16_000, np.full(9000, np.nan)))


def test_pairs_and_dictionaries_are_single_recordings(model, alone):
    samples = GOOD[0]
    for form in ((16_000, samples), (samples, 16_000), {"array": samples, "sampling_rate": 16_000}, {"raw": samples}):
        assert told(transcribe(model, form, **OPTIONS)) == alone[0]
    forms = [(16_000, GOOD[0]), {"audio": {"array": GOOD[1], "sampling_rate": 16_000}}, GOOD[2], (GOOD[3], 16_000)]
    assert [*map(told, transcribe(model, forms, batch_size=2, **OPTIONS))] == alone
    own = {"array": samples, "sampling_rate": 16_000, "path": None, "language": "en"}
    assert told(transcribe(model, own, temperature=0.0)) == alone[0]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("batch_size", ["2"])
def test_a_file_that_states_an_absurd_rate_costs_the_command_one_line(digits, shared, tmp_path, capsys, batch_size):
    good = shared / "audio" / "en_short_3s.flac"
    bad = tmp_path / "absurd.wav"
    data = bytearray(write_wav(bad, as_int16(load_audio(good))).read_bytes())
    data[24:28] = (2**31 - 1).to_bytes(4, "little")
    bad.write_bytes(data)
    options = ["--model", str(digits), "-o", str(tmp_path / "out"), "-f", "txt", "--language", "en"]
    options += ["--beam_size", "None", "--batch_size", batch_size, "--compilation_cache", "False", "--verbose", "None"]
    assert main([*options, str(bad), str(good)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"whisper-nnx: {bad}: sampling_rate=2147483647 must be a whole number of Hz")
    assert (tmp_path / "out" / "en_short_3s.txt").read_text() == "Six zero nine.\n"

"""whisper.cpp's sample grammars give the texts that whisper.cpp itself gives, recorded in `whisper_cpp/texts.json`.

Made by libwhisper 1.8.5 (of pywhispercpp 1.5.1, whose Python API has no grammars) through its C API, with
`examples/grammar-parser.cpp`: tiny.en converted to ggml in float16, log-mel spectrograms of this package
(`whisper_set_mel`), greedy, without timestamps, temperature increments and context of earlier windows, with an initial
prompt for each grammar, on a CPU without flash attention.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from whisper_nnx import DecodingOptions, load_audio, load_model, log_mel_spectrogram, pad_or_trim
from whisper_nnx.transcription.windows import decode_windows, encode_windows

FOLDER = Path(__file__).with_name("whisper_cpp")
RECORDED = json.loads((FOLDER / "texts.json").read_text())
RATE, CLIP_S = 16_000, 4


@pytest.fixture(scope="module")
def model(real_tiny_en):
    return load_model(real_tiny_en)


@pytest.fixture(scope="module")
def encoded(model, real_speech):
    clips = [load_audio(str(real_speech(name)))[at * RATE :][: CLIP_S * RATE] for name, at in RECORDED["clips"]]
    return encode_windows(model, np.stack([log_mel_spectrogram(pad_or_trim(clip)) for clip in clips]))


def cases() -> list[Any]:
    """The larger grammar needs a program of its own."""
    marks = {"assistant": [pytest.mark.slow]}
    return [
        pytest.param(case, marks=marks.get(case["grammar"], []), id=f"{case['grammar']}-{case['penalty']:g}")
        for case in RECORDED["cases"]
    ]


@pytest.mark.real
@pytest.mark.parametrize("case", cases())
def test_texts_are_those_of_whisper_cpp(model, encoded, case):
    options = DecodingOptions(
        language="en",
        without_timestamps=True,
        grammar=FOLDER / f"{case['grammar']}.gbnf",
        grammar_penalty=case["penalty"],
        prompt=case["prompt"],
    )
    rows = len(RECORDED["clips"])
    found = decode_windows(model, encoded, [options] * rows, range(rows))
    assert [result.text for result in found] == case["texts"]


def test_the_records_are_of_all_grammars_and_not_all_alike():
    assert {case["grammar"] for case in RECORDED["cases"]} == {file.stem for file in FOLDER.glob("*.gbnf")}
    assert len({text for case in RECORDED["cases"] for text in case["texts"]}) >= 10

"""The options of whisper.cpp's command: each is understood, or answered in one line."""

import pytest

from whisper_nnx.cli.parser import spelled_out
from whisper_nnx.cli.transcribe import build_parser

PARSER = build_parser()
# All options of examples/cli of whisper.cpp 1.8, and the names of whisper_full_params that its users know.
WITH_VALUE = """
-t --threads -p --processors -ot --offset-t -on --offset-n -d --duration -mc --max-context -ml --max-len -bo --best-of
-bs --beam-size -ac --audio-ctx -wt --word-thold -et --entropy-thold -lpt --logprob-thold -nth --no-speech-thold -tp
--temperature -tpi --temperature-inc -fp --font-path -of --output-file -l --language --prompt -m --model --file -oved
--ov-e-device -dtw --dtw -dev --device --suppress-regex --grammar --grammar-rule --grammar-penalty -vm --vad-model -vt
--vad-threshold -vspd --vad-min-speech-duration-ms -vsd --vad-min-silence-duration-ms -vmsd --vad-max-speech-duration-s
-vp --vad-speech-pad-ms -vo --vad-samples-overlap --tdrz-speaker-turn
"""
WITHOUT_VALUE = """
-debug --debug-mode -tr --translate -di --diarize -tdrz --tinydiarize -sow --split-on-word -nf --no-fallback -otxt
--output-txt -ovtt --output-vtt -osrt --output-srt -owts --output-words -olrc --output-lrc -ocsv --output-csv -oj
--output-json -ojf --output-json-full -np --no-prints -ps --print-special -pc --print-colors --print-confidence -pp
--print-progress -nt --no-timestamps -dl --detect-language --carry-initial-prompt -ls --log-score -ng --no-gpu -fa
--flash-attn -nfa --no-flash-attn -sns --suppress-nst --vad
"""
NUMBERLESS = {"-l": "en", "--language": "en", "--device": "gpu:1", "-fp": "x", "-m": "x", "--file": "a.wav"}


@pytest.mark.parametrize("name", [*WITH_VALUE.split(), *WITHOUT_VALUE.split()])
def test_each_option_is_understood_or_answered(name: str, capsys: pytest.CaptureFixture) -> None:
    value = [NUMBERLESS.get(name, "1")] if name in WITH_VALUE.split() else []
    try:
        assert PARSER.parse_args(spelled_out([name, *value, "a.wav"], PARSER)).audio[-1] == "a.wav"
    except SystemExit:
        (line,) = capsys.readouterr().err.splitlines()
        assert f"error: {name} has no counterpart here" in line or f"error: {name} is " in line


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        ("-t 4 -m x -l de", "--threads=4 --model=x --language=de"),
        ("-ot 1500 -d 2000", "--offset_s=1.5 --duration_s=2.0"),
        ("-d 0", ""),
        ("-osrt --output-vtt a.wav -ls", "a.wav --token_timestamps=True --output_format=srt,vtt,score"),
        (
            "-nf -lpt -0.5 --entropy-thold=2",
            "--temperature_increment_on_fallback=None --logprob_threshold=-0.5 --entropy_threshold=2",
        ),
        ("-ac 512 -tr -sns", "--audio_ctx=512 --task=translate --suppress_tokens=-1"),
        ("--file a.wav -- -t", "a.wav -- -t"),
        ("-dev 1", "--device=gpu:1"),
    ],
)
def test_options_become_those_of_the_same_meaning(arguments: str, ours: str) -> None:
    assert spelled_out(arguments.split(), PARSER) == ours.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("a.wav -t", "-t requires a value"),
        ("-ot soon a.wav", "-ot: 'soon' is not a whole number of milliseconds"),
        ("-osrt -f vtt a.wav", "-f and options such as -osrt both choose the formats"),
        ("-wt 0.1 a.wav", "-wt has no counterpart here: words and tokens are timed by attention"),
        ("--output-words a.wav", "is --output_format ass --word_timestamps True here"),
    ],
)
def test_what_is_not_understood_is_answered_in_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        spelled_out(arguments.split(), PARSER)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

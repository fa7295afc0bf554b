"""The options of the command `whisper-nnx`, as a table: openai-whisper's under their names, and our own."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from whisper_nnx.output.writers import WRITERS, parse_formats
from whisper_nnx.timing.words import APPENDED, PREPENDED

T = TypeVar("T")

# Options of `transcribe` that openai-whisper has too, which are always given, and our own, given where they are set.
TRANSCRIBE_OPTIONS = (
    *("verbose", "task", "language", "best_of", "beam_size", "patience", "length_penalty", "suppress_tokens"),
    *("initial_prompt", "carry_initial_prompt", "condition_on_previous_text", "compression_ratio_threshold"),
    *("logprob_threshold", "no_speech_threshold", "word_timestamps", "prepend_punctuations", "append_punctuations"),
    *("clip_timestamps", "hallucination_silence_threshold"),
)
OWN_TRANSCRIBE_OPTIONS = (
    *("batch_size", "print_colors", "allowed_languages", "multilingual", "language_detection_segments"),
    *("language_detection_threshold", "diarize", "tinydiarize", "suppress_regex", "without_timestamps"),
    *("max_new_tokens", "max_repeats", "repetition_penalty", "no_repeat_ngram_size", "n_best", "hotwords"),
    *("max_context", "offset_s", "duration_s", "independent_clips", "vad_filter", "token_timestamps"),
    *("alignment_heads", "refine_word_times", "follow_timestamps", "max_hours", "audio_track"),
)
DRIVER_OPTIONS = ("verbose", "batch_size", "print_colors")  # of these, those that no recording has for itself
VAD = "vad_"  # before the names of the voice detector's parameters
VAD_OPTIONS = tuple(
    f"{VAD}{name}"
    for name in (
        "threshold",
        "neg_threshold",
        "min_speech_duration_ms",
        "max_speech_duration_s",
        "min_silence_duration_ms",
        "speech_pad_ms",
    )
)
SUBTITLE_OPTIONS = (
    *("highlight_words", "max_line_count", "max_line_width", "max_words_per_line", "max_len", "split_on_word"),
)
# All that openai-whisper's command does not have.
OWN_OPTIONS = {
    *(*OWN_TRANSCRIBE_OPTIONS, *VAD_OPTIONS, "max_len", "split_on_word", "tokenizer", "revision", "token"),
    *("dtype", "weights", "compilation_cache", "traceback", "version", "recursive", "output_name", "skip_existing"),
    *("keep_partial", "detect_language"),
}


def _optional(parse: Callable[[str], T]) -> Callable[[str], T | None]:
    def parse_unless_none(text: str) -> T | None:
        return None if text.lower() == "none" else parse(text)

    parse_unless_none.__name__ = parse.__name__  # argparse shows it: invalid int value
    return parse_unless_none


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def _cache(text: str) -> bool | str:
    return {"true": True, "false": False, "none": False}.get(text.lower(), text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 0 or more")
    return int(text)


def _at_least_one(text: str) -> int:
    if _count(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return int(text)


def _formats(text: str) -> str:
    try:
        parse_formats(text)
    except ValueError as error:
        hint = "; files need no option, -f is --output_format" if os.path.exists(text) else ""
        raise argparse.ArgumentTypeError(f"{str(error).removeprefix('format=')}{hint}") from None
    return text


def _language(text: str) -> str | None:
    from whisper_nnx.text.languages import language_or_none, to_language_code

    try:
        return None if language_or_none(text) is None else to_language_code(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _languages(text: str) -> list[str] | None:
    return [code for name in text.split(",") if (code := _language(name.strip()))] or None


def _device(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(cpu|gpu|cuda|tpu)(?::(\d+))?", text.lower())
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device; give cpu, gpu, cuda or tpu, with an index as in gpu:1"
        )
    return match[1], int(match[2] or 0)


def _kind(parse: Callable[[str], Any], metavar: str | None, **more: Any) -> dict[str, Any]:
    return {"type": parse, "metavar": metavar, **more}


FLAG = _kind(_boolean, "{True,False}")
FLAG_OR_NONE = _kind(_optional(_boolean), "{True,False,None}")
NUMBER, NUMBER_OR_NONE = _kind(float, "X"), _kind(_optional(float), "X")
COUNT, SOME = _kind(_count, "N"), _kind(_at_least_one, "N")
WHOLE_OR_NONE, COUNT_OR_NONE = _kind(_optional(int), "N"), _kind(_optional(_count), "N")
TEXT, FOLDER = _kind(str, "TEXT"), _kind(str, "FOLDER")
TASK = _kind(str, None, choices=["transcribe", "translate"])
CACHE = _kind(_cache, "WHERE")
FLOATS = ["float32", "bfloat16", "float16"]
DTYPE, WEIGHTS = _kind(str, None, choices=FLOATS), _kind(str, None, choices=[*FLOATS, "int8"])

# Group -> options, each with its kind, default and help. The order is that of --help.
OPTIONS: dict[str, list[tuple[str, dict[str, Any], Any, str]]] = {
    "input and output": [
        ("--recursive", FLAG, False, "search the folders in a folder, too; outputs keep their place in it"),
        ("--audio_track", COUNT_OR_NONE, None, "which of a file's audio tracks, from 0 (default: as ffmpeg chooses)"),
        ("--output_dir", FOLDER, ".", "where to write; made if missing"),
        ("--output_name", TEXT, None, "name of the outputs without extension (default: the recording's)"),
        ("--output_format", _kind(_formats, "FORMATS"), "all",
         f"{', '.join(WRITERS)}; srt,json: several; all: the first five; json_full needs --token_timestamps True"),
        ("--skip_existing", FLAG, False, "leave out recordings whose outputs are all there"),
        ("--keep_partial", FLAG, False, "on Ctrl-C write what was transcribed so far, as NAME.partial.srt and so on"),
        ("--verbose", FLAG_OR_NONE, True, "print the text as it comes, or (False) show a progress bar; None: neither"),
        ("--print_colors", FLAG, False, "colour what is printed from red to green, by its probability"),
    ],
    "model": [
        ("--model", _kind(str, "NAME"), "turbo", "tiny, large-v3 ...; a repository; a folder or file in any format"),
        ("--model_dir", FOLDER, None, "where downloads are kept (default: Hugging Face's cache)"),
        ("--tokenizer", TEXT, None, "folder, repository or .tiktoken file, if the model comes without"),
        ("--revision", TEXT, None, "branch, tag or commit of the repository"),
        ("--token", TEXT, None, "for private repositories; better kept in the environment, as HF_TOKEN"),
    ],
    "task": [
        ("--task", TASK, "transcribe", "write what is said, or its translation to English"),
        ("--language", _kind(_optional(_language), "NAME"), None, "what is spoken: de, de-AT, German (default: auto)"),
        ("--detect_language", FLAG, False, "print the language of each recording, and do no more"),
        ("--allowed_languages", _kind(_languages, "NAMES"), None, "what it may be, where it is detected: de,French"),
        ("--multilingual", FLAG, False, "detect the language of every window anew"),
        ("--language_detection_segments", SOME, 1, "windows of 30 s to detect it from"),
        ("--language_detection_threshold", NUMBER_OR_NONE, None, "a window that is surer decides alone (default: 0.5)"),
        ("--diarize", FLAG, False, "tell who speaks, by the louder channel of a stereo recording"),
        ("--tinydiarize", FLAG, False, "mark where another one goes on, if the model was trained to (tdrz)"),
    ],
    "decoding": [
        ("--temperature", NUMBER, 0.0, "0 takes the most probable words, more samples them"),
        ("--best_of", WHOLE_OR_NONE, 5, "samples of which the best is kept, at temperatures above 0"),
        ("--beam_size", WHOLE_OR_NONE, 5, "beams of the search, at temperature 0; None is greedy"),
        ("--patience", NUMBER_OR_NONE, None, "finished beams to wait for, times beam_size (default: 1.0)"),
        ("--length_penalty", NUMBER_OR_NONE, None, "alpha, from 0 to 1 (default: divide by the length)"),
        ("--suppress_tokens", _kind(_optional(str), "IDS"), "-1", "tokens never to write: 1,2,3; -1 is most symbols"),
        ("--suppress_regex", TEXT, None, "tokens never to write: those whose text matches"),
        ("--without_timestamps", FLAG, False, "write text alone, in segments of whole windows"),
        ("--max_new_tokens", COUNT_OR_NONE, None, "of a window (default: half the model's context)"),
        ("--max_repeats", COUNT_OR_NONE, None, "a window is tried again if a phrase comes so many times in a row"),
        ("--repetition_penalty", NUMBER, 1.0, "above 1 makes what was said in the window less probable"),
        ("--no_repeat_ngram_size", COUNT, 0, "so many tokens in a row are never said twice in a window; 0: no rule"),
        ("--n_best", SOME, 1, "candidates of each window to keep in the json, at most beam_size or best_of"),
    ],
    "long recordings": [
        ("--initial_prompt", TEXT, None, "what may have been said before: names, spelling, style"),
        ("--carry_initial_prompt", FLAG, False, "put it before every window, not the first alone"),
        ("--hotwords", TEXT, None, "words that may come up, told to every window"),
        ("--condition_on_previous_text", FLAG, None, "tell windows the text before (default: as the model wants)"),
        ("--max_context", COUNT_OR_NONE, None, "tokens of previous text to tell (default: half the model's context)"),
        ("--temperature_increment_on_fallback", NUMBER_OR_NONE, 0.2, "added for each new try, up to 1; None: one try"),
        ("--compression_ratio_threshold", NUMBER_OR_NONE, 2.4, "try again if text repeats itself: compresses better"),
        ("--logprob_threshold", NUMBER_OR_NONE, -1.0, "try again if the average token is less probable"),
        ("--no_speech_threshold", NUMBER_OR_NONE, 0.6, "improbable text is silence if that is more probable"),
        ("--clip_timestamps", TEXT, "0", "what to transcribe, in seconds: start,end,start,end,..."),
        ("--offset_s", NUMBER, 0.0, "where to begin, in seconds"),
        ("--duration_s", NUMBER_OR_NONE, None, "how much to transcribe, in seconds (default: all)"),
        ("--follow_timestamps", FLAG, True, "silence where the sound of a video starts late or pauses; False: no gaps"),
        ("--max_hours", NUMBER_OR_NONE, None, "the longest recording that is decoded (default: 24)"),
        ("--independent_clips", FLAG, False, "decode clips as recordings of their own, that can share a batch"),
    ],
    "voice activity (these need --vad_filter True)": [
        ("--vad_filter", FLAG, False, "transcribe only speech, in pieces of up to 30 s that can share a batch"),
        ("--vad_threshold", NUMBER_OR_NONE, None, "probability from which on sound is speech (default: 0.5)"),
        ("--vad_neg_threshold", NUMBER_OR_NONE, None, "probability below which it no longer is (default: 0.15 less)"),
        ("--vad_min_speech_duration_ms", COUNT_OR_NONE, None, "drop speech that is no longer (default: 0)"),
        ("--vad_max_speech_duration_s", NUMBER_OR_NONE, None, "cut speech that is longer (default: no limit)"),
        ("--vad_min_silence_duration_ms", COUNT_OR_NONE, None, "silence that ends a stretch of speech (default: 2000)"),
        ("--vad_speech_pad_ms", COUNT_OR_NONE, None, "added to both ends of a stretch of speech (default: 400)"),
    ],
    "word timestamps": [
        ("--word_timestamps", FLAG, False, "time every word, and refine the segments by it"),
        ("--refine_word_times", FLAG, False, "time words more closely, without pauses (with the option above)"),
        ("--token_timestamps", FLAG, False, "time every token, too, for json, json_full and --max_len"),
        ("--alignment_heads", _kind(_optional(str), "HEADS"), None, "1:0,2:1 (layer:head); 3: all of the top 3 layers"),
        ("--prepend_punctuations", TEXT, PREPENDED, "marks that belong to the word after them"),
        ("--append_punctuations", TEXT, APPENDED, "marks that belong to the word before them"),
        ("--hallucination_silence_threshold", NUMBER_OR_NONE, None, "skip longer silence, in s, beside invented text"),
    ],
    "subtitles (vtt, srt, lrc and ass; these need --word_timestamps True)": [
        ("--highlight_words", FLAG, False, "underline each word while it is spoken"),
        ("--max_line_width", COUNT_OR_NONE, None, "characters of a line (default: no limit)"),
        ("--max_line_count", COUNT_OR_NONE, None, "lines of a subtitle; needs --max_line_width (default: no limit)"),
        ("--max_words_per_line", COUNT_OR_NONE, None, "words of a subtitle, instead of these two (default: no limit)"),
        ("--max_len", COUNT_OR_NONE, None, "characters of a subtitle; cuts between tokens (--token_timestamps True)"),
        ("--split_on_word", FLAG, False, "cut between words instead (--word_timestamps True)"),
    ],
    "performance": [
        ("--batch_size", SOME, 1, "recordings, or pieces of them, to decode together"),
        ("--device", _kind(_device, "NAME"), None, "cpu, gpu, cuda, tpu; gpu:1 is the second (default: the fastest)"),
        ("--dtype", DTYPE, None, "of the computation (default: float32 on CPUs, float16 on GPUs, bfloat16 on TPUs)"),
        ("--weights", WEIGHTS, None, "of the parameters in memory (default: as --dtype); int8 takes least"),
        ("--fp16", FLAG, None, "True is --dtype float16 (on CPUs float32 all the same), False is --dtype float32"),
        ("--threads", COUNT_OR_NONE, 0, "of the CPU; 0: one per core"),
        ("--compilation_cache", CACHE, True, "keep compiled programs: True, False, or in this folder"),
    ],
}  # fmt: skip

# Keyword arguments of the functions behind the command -> its flags.
_FLAGS = {name.removeprefix("--"): name for options in OPTIONS.values() for name, *_ in options}
_FLAGS |= {name.removeprefix(VAD): f"--{name}" for name in VAD_OPTIONS}
_FLAGS |= {"stream": "--audio_track", "temperatures": "--temperature", "cache_dir": "--model_dir"}
# Before "=", or alone where it is no English word. Not in flags and paths.
_KEYWORD = re.compile(
    rf"(?<![\w./\\-])(?:({'|'.join(_FLAGS)})=|({'|'.join(n for n in _FLAGS if '_' in n)}|diarize)(?![\w=/\\-]|\.\w))"
)


def as_flags(message: str) -> str:
    """A message about keyword arguments, in the words of the command: "set max_len=5" -> "set --max_len 5"."""
    return _KEYWORD.sub(lambda match: f"{_FLAGS[match[1]]} " if match[1] else _FLAGS[match[2]], message)

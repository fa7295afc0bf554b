"""Options of faster-whisper, whisperX, whisper.cpp and others that exist here under another name, or not at all."""

from __future__ import annotations

# All options of openai-whisper's command, version 20250625.
_OPENAI = """
model model_dir device output_dir output_format verbose task language temperature best_of beam_size patience
length_penalty suppress_tokens initial_prompt carry_initial_prompt condition_on_previous_text fp16 threads
temperature_increment_on_fallback compression_ratio_threshold logprob_threshold no_speech_threshold word_timestamps
prepend_punctuations append_punctuations highlight_words max_line_width max_line_count max_words_per_line
clip_timestamps hallucination_silence_threshold
"""
OPENAI_OPTIONS = frozenset(_OPENAI.split())

_UNKNOWN_TO_COMMAND = "is a keyword argument of whisper_nnx.transcribe; the command has no option for it"
_ATTENTION = "has no counterpart here: words are timed by the model's own attention (--word_timestamps True)"
_CHANNELS = "has no counterpart here: --diarize True tells speakers by the channels of a stereo recording"

# Options of the other commands, as they are written with underscores, and the rest of a sentence about each.
_WHISPER_CPP = {
    "-t": "is --threads here",
    "-p --processors": "has no counterpart here; --batch_size decodes several recordings together",
    "-ot --offset_t": "is --offset_s here, in seconds",
    "-d --duration": "is --duration_s here, in seconds",
    "-mc": "is --max_context here",
    "-ml": "is --max_len here",
    "-sow": "is --split_on_word True here",
    "-bo": "is --best_of here",
    "-bs": "is --beam_size here",
    "-et --entropy_thold": "is --compression_ratio_threshold here, which measures repetition otherwise",
    "-lpt --logprob_thold --log_prob_threshold": "is --logprob_threshold here",
    "-nth --no_speech_thold": "is --no_speech_threshold here",
    "-tp": "is --temperature here",
    "-tpi": "is --temperature_increment_on_fallback here",
    "-nf --no_fallback": "is --temperature_increment_on_fallback None here",
    "-tr --translate": "is --task translate here",
    "-di": "is --diarize True here",
    "-tdrz": "is --tinydiarize True here",
    "-otxt --output_txt": "is --output_format txt here (-f txt; several with commas: -f txt,srt)",
    "-ovtt --output_vtt": "is --output_format vtt here (-f vtt; several with commas: -f vtt,srt)",
    "-osrt --output_srt": "is --output_format srt here (-f srt; several with commas: -f srt,vtt)",
    "-olrc --output_lrc": "is --output_format lrc here (-f lrc)",
    "-ocsv --output_csv": "is --output_format csv here (-f csv)",
    "-oj --output_json": "is --output_format json here (-f json)",
    "-ojf --output_json_full": "is --output_format json_full --token_timestamps True here",
    "-owts --output_words": "is --output_format ass --word_timestamps True here (karaoke)",
    "-of --output_file": "is --output_name here, for the name, and --output_dir, for the folder",
    "--file": "is not needed here: files are given without an option",
    "-np --no_prints": "is --verbose None here",
    "-pp --print_progress --log_progress": "is --verbose False here",
    "-pc --print_confidence": "is --print_colors True here",
    "-ps --print_special -ls --log_score": "is part of the json here (-f json: tokens, probabilities)",
    "-nt --no_timestamps": "is --without_timestamps True here; -f txt writes text alone in any case",
    "-l": "is --language here",
    "-dl": "is --detect_language here",
    "--prompt": "is --initial_prompt here",
    "-m": "is --model here",
    "-dtw --dtw": "is --word_timestamps True here, with the model's own heads or those of --alignment_heads",
    "-ng --no_gpu": "is --device cpu here",
    "-dev": "is --device here, as in --device gpu:1",
    "-sns --suppress_nst": "is --suppress_tokens -1 here, which is the default",
    "-debug --debug_mode": "is --traceback here",
    "--vad": "is --vad_filter True here",
    "-vt --vad_onset": "is --vad_threshold here",
    "-vspd": "is --vad_min_speech_duration_ms here",
    "-vsd": "is --vad_min_silence_duration_ms here",
    "-vmsd": "is --vad_max_speech_duration_s here",
    "-vp": "is --vad_speech_pad_ms here",
    "-vm --vad_model --vad_method": "has no counterpart here: --vad_filter True uses Silero's model, from its package",
    "-vo --vad_samples_overlap -ac --audio_ctx -wt --word_thold -on --offset_n": "has no counterpart here; drop it",
    "-fp --font_path -oved --ov_e_device -fa --flash_attn -nfa --no_flash_attn": "has no counterpart here; drop it",
    "--grammar --grammar_rule --grammar_penalty": "has no counterpart here; --suppress_regex rules out tokens",
}
_FASTER_WHISPER_AND_WHISPERX = {
    "--compute_type": "is --dtype here, or --weights for int8",
    "--device_index": "is part of --device here, as in --device gpu:1",
    "--cpu_threads": "is --threads here",
    "--num_workers --batched": "is --batch_size here, with --vad_filter True for the pieces of one recording",
    "--download_root --model_directory --cache_directory": "is --model_dir here",
    "--local_files_only --model_cache_only": "is HF_HUB_OFFLINE=1 in the environment here",
    "--use_auth_token --hf_token": "is --token here",
    "--vad_parameters": "is --vad_threshold, --vad_speech_pad_ms and others here, one option for each",
    "--vad_offset": "is --vad_neg_threshold here",
    "--chunk_size --chunk_length": "has no counterpart here: windows last 30 s (see --vad_max_speech_duration_s)",
    "--prompt_reset_on_temperature": "has no counterpart here: it is 0.5, as in openai-whisper",
    "--max_initial_timestamp --prefix --suppress_blank --length_limit --seed": _UNKNOWN_TO_COMMAND,
    "--align_model --interpolate_method --return_char_alignments": _ATTENTION,
    "--no_align": "is --word_timestamps False here, which is the default",
    "--diarize_model --min_speakers --max_speakers --speaker_embeddings": _CHANNELS,
    "--suppress_numerals": "is --suppress_regex '[0-9]' here",
    "--segment_resolution": "has no counterpart here; --max_words_per_line and --max_line_width cut cues",
    "--log_level": "is --verbose here: True, False or None",
    "-V": "is --version here",
}
_OF_LOADING = "is given when the model is loaded: load_model"
_OF_WRITERS = "is for writing: whisper_nnx.get_writer(format, folder)(result, audio"
# Keyword arguments of the other packages' functions.
_KEYWORDS = {
    "log_prob_threshold logprob_thold": "is logprob_threshold here",
    "no_speech_thold": "is no_speech_threshold here",
    "entropy_thold": "is compression_ratio_threshold here, which measures repetition otherwise",
    "log_progress print_progress combined_progress show_progress": "is verbose=False here, or progress=FUNCTION",
    "prompt_reset_on_temperature": "has no counterpart here: it is 0.5, as in openai-whisper",
    "chunk_length chunk_size chunk_length_s": "has no counterpart here: windows last 30 s (see vad_filter)",
    "vad vad_options": "is vad_filter=True here, with vad_parameters={'threshold': ...}",
    "vad_onset vad_threshold": "is vad_parameters={'threshold': ...} here, with vad_filter=True",
    "vad_offset": "is vad_parameters={'neg_threshold': ...} here, with vad_filter=True",
    "translate": "is task='translate' here",
    "temperature_inc temperature_increment_on_fallback": "is part of temperature here: (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)",
    "no_context": "is condition_on_previous_text=False here",
    "n_max_text_ctx": "is max_context here",
    "max_tokens": "is max_new_tokens here",
    "offset_ms": "is offset_s here, in seconds",
    "duration_ms": "is duration_s here, in seconds",
    "tdrz_enable": "is tinydiarize here",
    "detect_language": "is language=None here, which is the default; the result names the language",
    "num_workers": "is batch_size here, for a list of recordings",
    "num_beams": "is beam_size here",
    "return_timestamps": "is word_timestamps=True here for words; segments always have times",
    "suppress_nst suppress_non_speech_tokens": "is suppress_tokens='-1' here, which is the default",
    "suppress_numerals": "is suppress_regex='[0-9]' here",
    "compute_type": f"{_OF_LOADING}(..., dtype=..., weights='int8')",
    "device device_index": f"{_OF_LOADING}(...) within `with jax.default_device(...)`",
    "download_root model_dir": f"{_OF_LOADING}(..., cache_dir=...)",
    "path_or_hf_repo": f"{_OF_LOADING}(...), whose result is transcribe's first argument",
    "cpu_threads n_threads threads": "is PJRT_NPROC in the environment here, set before JAX is imported",
    "highlight_words max_line_width max_line_count max_words_per_line max_len split_on_word": f"{_OF_WRITERS}, OPTION)",
    "output_format output_dir": f"{_OF_WRITERS})",
}


def _by_name(*tables: dict[str, str]) -> dict[str, str]:
    return {name: rest for table in tables for names, rest in table.items() for name in names.split()}


OTHER_OPTIONS = _by_name(_WHISPER_CPP, _FASTER_WHISPER_AND_WHISPERX)
OTHER_KEYWORDS = _by_name(_KEYWORDS)

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

# Options of whisper.cpp's command, as they are written with underscores -> the arguments that they stand for here.
# {}: the option's value; {ms}: it, in seconds.
_MEANT = {
    "-t": "--threads {}",
    "-ot --offset_t": "--offset_s {ms}",
    "-d --duration": "--duration_s {ms}",
    "-mc": "--max_context {}",
    "-ml": "--max_len {} --token_timestamps True",
    "-sow": "--split_on_word True --word_timestamps True",
    "-bo": "--best_of {}",
    "-bs": "--beam_size {}",
    "-ac": "--audio_ctx {}",
    "-et --entropy_thold": "--entropy_threshold {}",
    "-lpt --logprob_thold": "--logprob_threshold {}",
    "-nth --no_speech_thold": "--no_speech_threshold {}",
    "-tp": "--temperature {}",
    "-tpi --temperature_inc": "--temperature_increment_on_fallback {}",
    "-nf --no_fallback": "--temperature_increment_on_fallback None",
    "-tr --translate": "--task translate",
    "-di": "--diarize True",
    "-tdrz": "--tinydiarize True",
    "-otxt --output_txt": "--output_format txt",
    "-ovtt --output_vtt": "--output_format vtt",
    "-osrt --output_srt": "--output_format srt",
    "-olrc --output_lrc": "--output_format lrc",
    "-ocsv --output_csv": "--output_format csv",
    "-oj --output_json": "--output_format json",
    "-ojf --output_json_full": "--output_format json_full --token_timestamps True",
    "-ls --log_score": "--output_format score --token_timestamps True",
    "--file": "{}",
    "-ps": "--print_special True",
    "-pc": "--print_colors True",
    "-nt --no_timestamps": "--without_timestamps True",
    "-l": "--language {}",
    "-dl": "--detect_language True",
    "--prompt": "--initial_prompt {}",
    "-m": "--model {}",
    "-ng --no_gpu": "--device cpu",
    "-dev": "--device gpu:{}",
    "-sns --suppress_nst": "--suppress_tokens -1",
    "--vad": "--vad_filter True",
    "-vt": "--vad_threshold {}",
    "-vspd": "--vad_min_speech_duration_ms {}",
    "-vsd": "--vad_min_silence_duration_ms {}",
    "-vmsd": "--vad_max_speech_duration_s {}",
    "-vp": "--vad_speech_pad_ms {}",
}

# Options of the other commands that need a decision, or have no counterpart: the rest of a sentence about each.
_WHISPER_CPP = {
    "-p --processors": "has no counterpart here: --vad_filter True, or --independent_clips True with "
    "--clip_timestamps, makes pieces of a recording, which --batch_size decodes together",
    "-on --offset_n": "has no counterpart here: segments are numbered from 0",
    "-wt --word_thold": "has no counterpart here: words and tokens are timed by attention, not by the probabilities of "
    "timestamps (--word_timestamps True)",
    "-owts --output_words --output_wts": "is --output_format ass --word_timestamps True here: karaoke for players",
    "-fp --font_path": "has no counterpart here: the style in the .ass file names the font",
    "-of --output_file": "is --output_name here, for the name, and --output_dir, for the folder",
    "--log_prob_threshold": "is --logprob_threshold here",
    "-np --no_prints": "is not needed here: text alone is printed, and with --verbose None nothing",
    "-pp --print_progress --log_progress": "is --verbose False here",
    "--print_confidence": "is --print_colors True here",
    "--tdrz_speaker_turn": "has no counterpart here: the text of a turn is [SPEAKER_TURN] (--tinydiarize True)",
    "-dtw --dtw": "is --word_timestamps True here, with the model's own heads or those of --alignment_heads",
    "-debug --debug_mode": "is --traceback here",
    "--vad_onset": "is --vad_threshold here",
    "-vm --vad_model --vad_method": "has no counterpart here: --vad_filter True uses Silero's model, from its package",
    "-vo --vad_samples_overlap": "has no counterpart here: --vad_speech_pad_ms lengthens the pieces on both sides",
    "-oved --ov_e_device": "has no counterpart here: --device chooses the device",
    "-fa --flash_attn -nfa --no_flash_attn": "has no counterpart here: attention is fused where the device can",
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
    "entropy_thold": "is entropy_threshold here",
    "masked_heads": "is for all recordings of a call: transcribe(..., masked_heads=), or --masked_heads of the server",
    "audio_ctx": "is for all recordings of a call: transcribe(..., audio_ctx=), or --audio_ctx of the server's command",
    "word_thold thold_pt thold_ptsum": "has no counterpart here: tokens are timed by attention (token_timestamps=True)",
    "n_processors": "has no counterpart here: vad_filter=True or independent_clips=True makes pieces, for batch_size",
    "no_fallback": "is temperature=0.0 here",
    "log_score": "is get_writer('score', folder) here, with token_timestamps=True",
    "tdrz_speaker_turn": "has no counterpart here: segments have speaker_turn, and writers add [SPEAKER_TURN]",
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


MEANT_OPTIONS = _by_name(_MEANT)
OTHER_OPTIONS = _by_name(_WHISPER_CPP, _FASTER_WHISPER_AND_WHISPERX)
OTHER_KEYWORDS = _by_name(_KEYWORDS)

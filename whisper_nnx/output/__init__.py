"""Transcripts and their presentation: results, files, subtitles, plots, progress."""

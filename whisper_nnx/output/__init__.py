"""Transcripts and how they are shown: results, files, subtitles, pictures, progress."""

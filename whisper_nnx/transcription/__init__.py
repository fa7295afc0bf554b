"""Recordings of any length to segments: windows, one after another, many recordings in a batch."""

"""Known texts and recordings: word times, likelihood, which heads follow the audio."""

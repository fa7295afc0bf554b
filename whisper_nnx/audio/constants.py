"""Constants of audio that the whole package uses; no numpy."""

SAMPLE_RATE = 16_000  # Hz
FRAMES_PER_SECOND = 100  # of the mel spectrogram
MAX_HOURS = 24.0  # 5.5 GB of samples

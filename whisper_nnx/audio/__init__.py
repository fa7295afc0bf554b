"""Converts recordings to the model's input: loading, features, voice activity, channels."""

"""From recordings to the model's input: loading, features, spans of speech, channels."""

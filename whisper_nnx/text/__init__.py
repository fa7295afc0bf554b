"""Tokens and words: the tokenizer, special tokens, languages. No jax."""

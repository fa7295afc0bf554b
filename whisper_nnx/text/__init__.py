"""Tokenizer, special tokens, languages and words. Does not import jax."""

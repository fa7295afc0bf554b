"""Grammars of transcripts: GBNF, regular expressions, choices and JSON schemas, as automata over bytes and tokens."""

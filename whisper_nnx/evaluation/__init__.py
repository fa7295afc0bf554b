"""How good transcripts are: `evaluate`, error rates, word times, tables and reports."""

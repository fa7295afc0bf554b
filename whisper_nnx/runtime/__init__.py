"""Process-level support: programs, caches, memory, files, console messages."""

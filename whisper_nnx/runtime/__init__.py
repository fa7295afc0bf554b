"""What a process needs to run: programs, caches, memory, files, messages."""

"""When words were spoken."""

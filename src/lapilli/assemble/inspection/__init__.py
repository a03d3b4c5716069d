"""What a path is: told by content, from headers alone."""

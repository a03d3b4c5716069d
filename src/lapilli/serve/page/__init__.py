"""The web page: its files, what it has to know, its examples, and the log of what was said on it."""

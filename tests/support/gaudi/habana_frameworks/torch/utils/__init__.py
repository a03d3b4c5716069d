"""Inner parts."""

"""Every on-disk model format, read and written."""

"""Readers: one file per format, each from a file on disk to Samples."""

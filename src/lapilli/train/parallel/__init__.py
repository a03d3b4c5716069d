"""Engines, one file each, all applied from outside the model."""

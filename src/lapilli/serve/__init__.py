"""A model for many users: an API over HTTP on the engine of `generate`, safe by default."""

"""LLaVA's own cluster protocol: a controller that knows workers, and workers that hold models."""

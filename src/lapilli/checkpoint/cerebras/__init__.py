"""Cerebras ModelZoo's LLaVA models: configurations, state files and trees, read and written."""

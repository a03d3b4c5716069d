"""Prompts in, text out: one engine that evaluation, chat and serving share."""

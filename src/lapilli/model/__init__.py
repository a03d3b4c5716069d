"""The model: vision encoder, projector and language model, and how they join."""

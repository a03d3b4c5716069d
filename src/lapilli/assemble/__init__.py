"""From parts to a model folder, and from any folder to a model."""

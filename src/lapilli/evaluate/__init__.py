"""The field's benchmarks: questions read, answered, scored, compared and shown."""

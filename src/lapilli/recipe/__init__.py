"""What a run is: the typed recipe, read from YAML and the command line, without torch."""

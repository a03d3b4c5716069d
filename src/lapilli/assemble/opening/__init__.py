"""Model folders opened without reading their weights, one file per format."""

"""The offline demonstration on real images: from two parts made openly to an assistant that is examined."""

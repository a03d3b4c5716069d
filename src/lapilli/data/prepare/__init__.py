"""Preparing data: conversations tokenised once, into sharded HDF5 that training, or Cerebras' own loader, reads."""

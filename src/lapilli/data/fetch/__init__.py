"""Bringing the published mixtures to this machine: a table of sources, a plan, downloads and unpacking."""

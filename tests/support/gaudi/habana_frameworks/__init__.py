"""A stand-in for Intel's package: what lapilli asks of it is noted in `calls`, and the CPU does the work."""

calls: list = []
devices = 1

"""Models in a process of their own, so that making answers and talking with clients share no interpreter."""

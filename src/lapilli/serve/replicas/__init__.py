"""The same engine in several processes of a Ray cluster: what runs in them, and what the server sees of them."""

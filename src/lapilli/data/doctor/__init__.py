"""`lapilli data check`: everything that could spoil a run, found before it starts."""

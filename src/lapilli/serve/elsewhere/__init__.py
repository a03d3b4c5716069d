"""Answers that others make, whoever they are: their turn, their way back, their end, and the words they are told in."""

"""Data, loss, metrics and example input of one kind of problem per file."""

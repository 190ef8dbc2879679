"""Kinds of cost, each in a file of its own."""

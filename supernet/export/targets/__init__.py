"""Machines that files are probed on: one module each."""

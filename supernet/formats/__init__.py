"""Number formats: which grid a number may sit on. No file here imports another one here."""

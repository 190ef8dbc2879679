"""The forms in which others write down which layer has how many bits; one module for each, and one for the names."""

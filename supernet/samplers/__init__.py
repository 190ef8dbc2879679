"""Which subnets to train now: one rule per file."""

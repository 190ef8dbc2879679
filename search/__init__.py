"""Which subnets to keep."""

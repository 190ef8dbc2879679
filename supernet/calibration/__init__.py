"""Make one subnet right without training it."""

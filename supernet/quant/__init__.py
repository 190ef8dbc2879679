"""Scales, straight-through gradients and the Quantizer."""

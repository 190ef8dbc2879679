"""Modules with several sizes or precisions, and the SuperNet made of them."""

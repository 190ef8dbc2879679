"""The model: what may vary, how it is quantized, trained and made real."""

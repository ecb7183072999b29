"""Inference, in the order it happens; start with `pipeline`."""

"""Learning, in the order it happens."""

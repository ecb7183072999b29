"""Python functions that return a whole frozen config; a variant calls another and replaces fields."""

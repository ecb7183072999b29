"""Thin command-line programs over the package."""

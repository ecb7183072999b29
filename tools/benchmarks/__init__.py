"""Timings against other implementations, one file per component; `tools/bench.py` runs them."""

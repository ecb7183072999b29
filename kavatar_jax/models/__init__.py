"""One network per file, with its sharding and conversion tables at its foot."""

"""Many subjects on many workers, by Ray."""

"""The files that a run's result vouches for: what they were when the result was written after them."""

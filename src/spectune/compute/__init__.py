"""Tensor functions that know no method."""

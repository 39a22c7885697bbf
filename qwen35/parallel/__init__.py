"""Tensor parallelism: a model over several ranks, which combine results and end together on an
error."""

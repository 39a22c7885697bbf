"""Tensor parallelism: a model over several ranks, which join results and end together on a failure."""

"""Tensor parallel: a model over several ranks, the nodes that join results, how a failure ends all."""

"""Tensor parallel: a model over several ranks, the nodes that join their results, how a failure ends all."""

"""Tensor parallel: the ranks of a model, the nodes that join their results, and how a failure ends all."""

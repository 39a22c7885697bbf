"""Comparing a model with the reference: traces, differences node by node, and when a node passes."""

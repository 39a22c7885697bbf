"""Checkpoint formats: reading tensors, and conversion between formats. It imports no model code."""

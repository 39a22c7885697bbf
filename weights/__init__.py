"""Checkpoint formats: from bytes to tensors and between formats. Knows no model code."""

"""Bytes to tensors. Knows no model code."""

"""Qwen3.5 in plain eager PyTorch: the specification."""

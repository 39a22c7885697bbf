"""Nodes with fused kernels, which replace the reference's; `qwen35/paths.py` decides when they run."""

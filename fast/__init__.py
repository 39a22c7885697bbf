"""The reference's nodes over fused kernels; `qwen35/paths.py` says when they run instead of it."""

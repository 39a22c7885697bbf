"""The front door: configuration, caches, tokenizer, generation."""

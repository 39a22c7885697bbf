"""The prefix cache: stores keys, values and delta-net states of prompt prefixes together."""

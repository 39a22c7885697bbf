"""The prefix cache: keys, values and delta-net states of prompts' beginnings, kept and evicted as one."""

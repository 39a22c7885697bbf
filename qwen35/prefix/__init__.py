"""The prefix cache: keys and values and delta-net states of prompts' beginnings, with one life."""

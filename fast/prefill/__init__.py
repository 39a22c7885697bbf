"""The fast path for the rows of a prompt: passes of 9 rows and more.

Each file has functions (`work` for the mixers) that return the launches of a node's pass as a list,
and the buffer that they fill. Between launches there may be torch operations on fixed buffers. The
bits of a row depend only on the tokens up to it. They depend neither on the other rows nor on where
a prompt is cut into passes, as long as the cuts are on the grid of 64 tokens.
"""

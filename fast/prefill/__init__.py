"""A prompt's rows through the fast nodes: passes of 9 rows and more.

Each file has functions (`work` for the mixers) that give the launches of a node's pass as a list, and
the buffer that they fill. Between launches there may be operations of torch on fixed buffers.
A row's bits depend on nothing but the tokens up to it: neither on the rows beside it nor on where a
prompt is cut, as long as that is on the grid of 64 tokens.
"""

"""The feed-forward nodes that a fast class can replace alone: pattern -> class, as in `--swap
PATTERN=MODULE:CLASS`."""

SWAPS = {
    "layers.*.mlp": "fast.moe:SparseMoeBlock",  # only where it is a mixture of experts
    "layers.*.mlp.experts": "fast.moe:Experts",
    "layers.*.mlp.gate": "fast.router:Router",
}

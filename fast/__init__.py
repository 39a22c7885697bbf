"""The nodes with a fast class: pattern -> class, for `swap` and for `--swap PATTERN=MODULE:CLASS`."""

SWAPS = {
    "layers.*.mlp": "fast.moe:SparseMoeBlock",  # only where it is a mixture of experts
    "layers.*.mlp.experts": "fast.moe:Experts",
    "layers.*.mlp.gate": "fast.router:Router",
}

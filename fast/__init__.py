"""What is fast today: node pattern -> replacement, for `swap` and for `--swap PATTERN=MODULE:CLASS`."""

SWAPS = {
    "layers.*.mlp": "fast.moe:SparseMoeBlock",  # of a mixture of experts, passes of 1 to 8 rows
    "layers.*.mlp.experts": "fast.moe:Experts",
    "layers.*.mlp.gate": "fast.router:Router",
}

"""
An optimizer without a preferred basis: `groups` (which parameter is updated by which rule), `step` (the optimizer),
`polar` (polar factors), `sharing` (work and tensors that processes share). `rigpt_hf.optim` is the stable name.
"""

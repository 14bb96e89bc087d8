"""
An optimizer without a preferred basis: `groups` (which parameter is updated by which rule), `step` (the optimizer),
`polar` (polar factors), `sharing` (work and tensors that processes share), `dealing` and `exchange` (polar factors of
matrices in shards), `plan` (bytes and messages of that). `rigpt_hf.optim` is the stable name.
"""

"""Programs for `accelerate launch`; installed as `rigpt_hf.training`."""

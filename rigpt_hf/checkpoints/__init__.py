"""Checkpoints as files: one reader of weights, one writer of folders, the certificate beside them."""

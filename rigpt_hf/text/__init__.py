"""Text that models are trained and measured on: where it comes from, and the tokenizers that cut it up."""

"""Bad inputs, drawn from a seed over all verbs and programs, and a judge of how they are answered."""

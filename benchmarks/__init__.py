"""How fast: each figure as a ratio against a named reference, both measured in the same run."""

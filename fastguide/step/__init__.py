"""One guided step: the operator, what it refuses, and its backends."""

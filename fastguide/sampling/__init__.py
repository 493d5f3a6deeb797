"""The sampling loop, repeated and captured."""

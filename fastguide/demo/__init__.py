"""The demo: guided sampling of handwritten digits, from training to a picture, a plot and a table."""

"""One file for each suite and one for each tool that it measures with."""

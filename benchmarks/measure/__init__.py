"""How each thing is measured: steps, loops, accuracy, guidance, and a GPU."""

"""What the tests share: the papers' formulas, random inputs, and stand-ins for what this machine lacks."""

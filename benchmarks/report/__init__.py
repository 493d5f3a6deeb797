"""Turn the measured rows into files: numbers, targets, plots and pages."""

"""What a run leaves behind: numbers, targets, plots and pages."""

"""The decisions: conflict, assign, average, extract. Pure functions, no input or output."""

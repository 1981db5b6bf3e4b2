"""Who does the work: streams tensors through pure functions, bounded by a byte budget."""

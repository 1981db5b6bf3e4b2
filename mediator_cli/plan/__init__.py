"""What will be done, from headers alone: the recipe's meaning for these checkpoints."""

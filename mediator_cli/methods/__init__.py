"""How tensors combine: the registry, and one file for each merge method."""

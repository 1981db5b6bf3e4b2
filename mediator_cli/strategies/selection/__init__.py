"""Which experts of a library to keep: clusters of them, greedy choices, or chance; see `select` and `curve`."""

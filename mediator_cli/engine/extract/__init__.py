"""Sparse experts: what each adds to the dense tensors of the routed units."""

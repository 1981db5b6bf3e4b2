"""A Mixture of Experts as a plan: which format, which tensors, made of what."""

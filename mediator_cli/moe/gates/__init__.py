"""Gates of a Mixture of Experts without training, and a look at what gates choose."""

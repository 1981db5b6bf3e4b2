"""Short fine-tuning of a Mixture of Experts: gates, gates and attention, or all."""

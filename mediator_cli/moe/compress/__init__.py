"""Fewer experts in a Mixture of Experts: some dropped, or some merged into one."""

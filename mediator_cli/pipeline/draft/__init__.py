"""A first recipe for a base and its experts, drafted from their headers."""

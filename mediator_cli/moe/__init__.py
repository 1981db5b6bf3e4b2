"""Mixtures of Experts that stock software serves: gates, training, compression."""

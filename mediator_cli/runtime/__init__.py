"""How a bundle answers: features, router, policy, and a model that mixes its experts for each input."""

"""HTTP of our own run time, as OpenAI's clients speak it."""

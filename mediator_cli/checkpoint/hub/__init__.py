"""The Hugging Face Hub: repositories found and pinned, headers read by range, weights fetched and resumed."""

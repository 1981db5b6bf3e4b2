"""What is on disk: headers, sources, adapters, reading and writing; knows nothing of merging."""

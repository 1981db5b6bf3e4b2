"""Ways to carry out one merge on several machines that share a folder."""

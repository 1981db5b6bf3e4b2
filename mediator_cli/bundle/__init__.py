"""What is written: the bundle format, its manifest, sparse experts, reading and verifying them."""

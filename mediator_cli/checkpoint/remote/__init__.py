"""Folders at URLs of fsspec: s3://, gs://, hf://, memory:// and others; weights are read there by ranges."""

"""A bundle behind an OpenAI-compatible server, and the router in front of other servers."""

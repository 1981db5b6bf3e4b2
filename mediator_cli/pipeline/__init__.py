"""The one place where stages are strung together: analyze conflicts, merge."""

"""What pays: the controls of a recipe, measured side by side."""

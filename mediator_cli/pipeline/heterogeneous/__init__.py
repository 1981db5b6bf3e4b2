"""From a recipe of kind `heterogeneous_moe` to a finished model folder."""

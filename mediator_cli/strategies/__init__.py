"""How a library of adapters answers: ensembles, merges, routers and selections, one small file each; see README.md."""

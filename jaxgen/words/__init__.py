"""Words before networks: encoded text, counts, factorisations, n-gram language models, training pairs."""

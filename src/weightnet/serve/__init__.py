"""The HTTP service: one process that answers with a model's predictions, in batches formed across clients."""

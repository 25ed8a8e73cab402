"""From a trained model to a query: the model as one object, a gallery of encoded videos, and search in it."""

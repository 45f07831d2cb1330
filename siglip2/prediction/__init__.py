"""A trained model in use: one picture, or more than fit into memory."""

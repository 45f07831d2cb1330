"""The product: a vision tower, a text tower, and the two together."""

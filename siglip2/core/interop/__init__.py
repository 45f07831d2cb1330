"""Weights in the formats of other libraries: read into our names, written out of them, compared in process."""

"""Pseudo-boxes: texts out of captions, a detector that looks for them, and shards with what it found."""

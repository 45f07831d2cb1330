"""The command `siglip2`."""

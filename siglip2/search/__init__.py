"""Search in the embeddings that `siglip2 embed` wrote: by text, or by picture."""

"""From shards to batches: sources, order, tokenizer, loader, and the Lightning datamodule."""

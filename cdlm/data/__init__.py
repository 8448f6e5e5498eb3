"""Text to batches: sources, tokenizer, token store, rows, a deterministic order, and masking laws for training.

The path of a document: a `sources.Source` yields it, `tokenizer` turns it into ids, `store` keeps the ids in a
memory-mapped folder and cuts them into rows, `order` deals the rows out as batches, and `masking` decides which
positions of a batch are to be generated.
"""

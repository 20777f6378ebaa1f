"""From files to batches: rows, their order, their randomness, and the images themselves."""

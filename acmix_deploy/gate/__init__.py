"""Whether a model became slower: measured in turn with the one before it, and judged against the noise."""

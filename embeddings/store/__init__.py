"""A site's embeddings as a file."""

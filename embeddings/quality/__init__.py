"""What a site's embeddings look like, for its own people."""

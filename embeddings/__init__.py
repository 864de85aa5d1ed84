"""From a site's images to its embeddings: encoders, readers, extraction, store, partitions, demo images.

Only the store is needed while a federation trains; it imports numpy and pyarrow alone. Encoders import torch
(and transformers) when one is made.
"""

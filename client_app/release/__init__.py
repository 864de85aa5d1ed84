"""How anything about records leaves a site: granted, charged, computed, kept, sent."""

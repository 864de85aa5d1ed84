"""The privacy ledger: every release that a site was charged, on its own disk."""

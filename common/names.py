"""Names that several programs must share: what a site may be called, and the file of a run's status."""

SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,40}$"
STATUS = "status.json"

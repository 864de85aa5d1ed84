"""What a site may be called, wherever its name is registered, said or shown."""

SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,40}$"

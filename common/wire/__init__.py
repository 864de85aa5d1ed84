"""What may cross between a site and the server."""

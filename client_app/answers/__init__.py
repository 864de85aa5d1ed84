"""What a site answers to each kind of message."""

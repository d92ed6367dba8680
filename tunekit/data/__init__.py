"""Pictures and captions: reading them, checking them all at once, encoding them once."""

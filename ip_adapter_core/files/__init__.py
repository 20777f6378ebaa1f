"""Model files on disk: what they hold, how they are recognized, found, read and written."""

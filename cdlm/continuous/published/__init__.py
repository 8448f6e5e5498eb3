"""Published networks and file formats."""

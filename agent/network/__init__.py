"""The VM's own links to the world."""

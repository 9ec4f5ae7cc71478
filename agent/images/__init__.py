"""Images: fetched, verified, kept, and mounted as layers and overlays."""

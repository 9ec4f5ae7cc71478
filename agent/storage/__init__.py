"""Where images and overlays are kept: the disk, its layout, its use."""

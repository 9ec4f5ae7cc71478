"""Where the agent lives: the image, its init, its boot, and the demo."""

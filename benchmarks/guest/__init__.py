"""What is measured inside the machine, by the image's own Python, next to its reference."""

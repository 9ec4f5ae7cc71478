"""What the kernel tells of the machine: how busy and how full it is, its mounts, its network."""

"""The machine itself: how busy and how full it is, its mounts, its network; and what of it is kept
right, its clock, its random numbers and its power button."""

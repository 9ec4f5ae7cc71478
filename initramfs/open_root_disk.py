"""What init runs to have a disk for the root's changes: DEVICE, and where to mount it."""

import sys

# As in run_agent.py.
sys.path.insert(0, "/usr/lib/innkeep")

from agent.storage.root_disk import main

sys.exit(main(sys.argv[1:]))

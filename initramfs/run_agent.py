"""What init starts: the agent, with nothing imported before it that it does not import itself."""

import sys

# Isolated, and without `site`, Python looks only into its standard library.
sys.path.insert(0, "/usr/lib/innkeep")

from agent.__main__ import main

sys.exit(main())

"""What is streamed, by which commands, in which frames: the same for agent and reference."""

from __future__ import annotations

CHUNK_BYTES = 64 * 1024
STDOUT_HEAD, STDIN_HEAD = b'{"status":"stdout","data":"', b'{"method":"stdin","data":"'
DATA_TAIL = b'"}'

# Nothing but holes, on a tmpfs: it takes no memory, and who writes it out hardly any time.
ZEROS = "/tmp/benchmark-zeros"
WRITE_OUT = ("cat", ZEROS)
READ_IN = ("sh", "-c", "exec cat >/dev/null")

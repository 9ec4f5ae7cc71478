"""System calls, one function each, under the kernel's own names; only the standard library."""

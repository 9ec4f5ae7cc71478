"""Connections of the workload protocol: each one authenticated, then served on its port."""

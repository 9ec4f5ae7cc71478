"""The VM's workload: who may reach it, where it runs, what it wrote, and that it goes on."""

"""RMS: dynamic NVIDIA MIG for Slurm. What a MIG node is: geometry, requests, inventory, devices, planning."""

__version__ = "0.1.0"

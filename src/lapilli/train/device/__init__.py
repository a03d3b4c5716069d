"""What differs between devices, and nothing else."""

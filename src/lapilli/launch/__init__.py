"""Starting runs: several processes here, a SLURM job, a SkyPilot task."""

"""Everything that knows Slurm: the hooks, the lua, asking and telling slurmctld, the configuration that it needs."""

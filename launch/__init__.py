"""Launch: from a list of overrides to a command on one machine or a job on a cluster.

Owns the cluster settings, the torchrun command, the Slurm script and the `trimtab` command line.
Refuses to import `train` or torch: a login node has neither the memory nor the patience for them.
Called by the console script `trimtab`; nothing in `train` imports it.
"""

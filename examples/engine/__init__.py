"""The training engine of the examples: training, checkpoints, several processes, files, command lines."""

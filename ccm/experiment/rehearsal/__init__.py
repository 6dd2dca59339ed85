"""What will a run cost on this machine? A run on a model with random weights, each stage timed."""

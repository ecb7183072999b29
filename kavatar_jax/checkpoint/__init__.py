"""Trees on disk: weights directories, torch files, training checkpoints. Knows no model."""

"""The known-answer world: procedural talking avatars with ground truth for every frame."""

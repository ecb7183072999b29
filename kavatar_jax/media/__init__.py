"""Files to numpy and back: speech, portraits, video, faces. Imports no jax."""

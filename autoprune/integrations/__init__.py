"""Other people's machinery around ours: Ray Tune drives a user's own search and the long fine-tuning of finalists."""

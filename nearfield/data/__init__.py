"""Real data that packages carry, and makers of synthetic data. Nothing is downloaded."""

"""Secondary attention sinks: tokens that collect attention in middle layers only, and what writes them."""

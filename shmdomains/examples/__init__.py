"""Programs to start from. Copy one, and change what is yours."""

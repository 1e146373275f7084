"""Which tokens exist, and the tables that move them into windows and back."""

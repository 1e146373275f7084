"""Which tokens a masked autoencoder hides."""

"""From features to predictions, and what of a pretrained encoder is trained."""

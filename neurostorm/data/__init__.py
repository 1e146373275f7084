"""From the frame store to patches on the device: which clips, in which order, how they get there."""

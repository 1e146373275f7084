"""What is predicted, of which unit, from which clips."""

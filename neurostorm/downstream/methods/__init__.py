"""The methods that are compared: networks trained by gradient, closed forms on vectors, baselines."""

"""Pretraining: a loop that knows no Ray, DeepSpeed behind a thin engine, and Ray Train around both."""

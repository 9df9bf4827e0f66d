"""Weights from learner to engines: what travels, and the gate that compares both sides byte for byte."""

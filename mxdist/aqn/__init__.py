"""Adaptive quantisation noise: the controller decides sigma, the injector puts noise into an engine's norms."""

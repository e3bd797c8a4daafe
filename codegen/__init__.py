"""Inductor lowerings, kernel templates and what they need to know about the machine."""

"""Tracing: a live call becomes a functional graph."""

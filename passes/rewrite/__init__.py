"""Rewrites: what analysis found is changed. Nothing here searches a graph."""
